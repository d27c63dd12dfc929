"""What was measured about an SAE on its model: maxima, densities, the typical norm, what each feature makes it say.

Shipped with the bundled SAEs; for any other they are measured once on a bundled text and kept in the cache. `2x` and
`0.5rn` rest on them, and so does the hiding of features that fire all the time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.bench import neutral_texts
from lancet.errors import MismatchError
from lancet.files import cache_dir, check_safetensors, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae

MEASURED_TEXTS = 500  # texts of the bench; about 38,000 tokens
DENSE = 0.1  # a feature that fires on a larger share of all tokens is hidden unless asked for


@dataclass(repr=False)
class Facts:
    """Facts about one SAE on one model.

    Attributes:
        maximum: [d_sae] largest activation seen, 0 where it never fired.
        density: [d_sae] share of all tokens (start tokens left out) on which it fires.
        norm: typical norm of the value at the site that the SAE writes: median L2 norm over tokens, start tokens left
            out.
        tokens: how many tokens this was measured on.
        effect_ids, effect_values: [d_sae, n] the tokens that the feature makes likelier and by how many nats, None
            where the effect lens has not been run over all features.
        concepts: concept -> {"feature", "auroc", "blend"}; the model card's table, empty where there is none.
    """

    maximum: Tensor
    density: Tensor
    norm: float
    tokens: int
    effect_ids: Tensor | None = None
    effect_values: Tensor | None = None
    concepts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        import torch
        from safetensors.torch import save_file

        tensors = {"maximum": self.maximum.float().cpu(), "density": self.density.float().cpu()}
        if self.effect_ids is not None and self.effect_values is not None:
            tensors["effect_ids"] = self.effect_ids.to(torch.int32).cpu().contiguous()
            tensors["effect_values"] = self.effect_values.half().cpu().contiguous()
        metadata = {"norm": repr(self.norm), "tokens": str(self.tokens), "concepts": json.dumps(self.concepts)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Facts:
        """Reads what `save` wrote.

        Raises:
            DamagedError: the file is damaged.
        """
        from safetensors import safe_open

        check_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            get = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return cls(
            maximum=get["maximum"],
            density=get["density"],
            norm=float(metadata["norm"]),
            tokens=int(metadata["tokens"]),
            effect_ids=get.get("effect_ids"),
            effect_values=get.get("effect_values"),
            concepts=json.loads(metadata["concepts"]),
        )


def measure(model: Model, sae: Sae, texts: list[str]) -> Facts:
    """Maxima, densities and the typical norm over texts."""
    import torch

    maximum = torch.zeros(sae.d_sae, device=model.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.long, device=model.device)
    norms, tokens = [], 0
    rows = sorted((model.tokenize(text, most=model.context) for text in texts), key=len)
    for first in range(0, len(rows), 32):
        batch = model.batch(rows[first : first + 32])
        values = model.values(batch, [sae.site, sae.writes])
        x, written = values[sae.site], values[sae.writes][batch.content]
        for features in sae.features_of(x, batch.content):
            maximum.scatter_reduce_(0, features.feature, features.value, "amax")
            fired += torch.bincount(features.feature, minlength=sae.d_sae)
        norms.append(written.float().norm(dim=1))
        tokens += len(written)
    return Facts(maximum, fired / tokens, float(torch.cat(norms).median()), tokens)


def of(model: Model, sae: Sae, shipped: Path | None = None) -> Facts:
    """The facts of a pair: shipped, else kept in the cache, else measured now and kept.

    Raises:
        MismatchError: the shipped facts are another SAE's.
    """
    if shipped is not None and shipped.is_file():
        facts = Facts.load(shipped)
        if len(facts.maximum) != sae.d_sae:
            raise MismatchError(
                f"{shipped} is about {len(facts.maximum)} features, {sae.name} has {sae.d_sae}: it is another SAE's; "
                f"delete it, and facts are measured anew"
            )
        return facts
    path = cache_dir() / "facts" / f"{fingerprint(model, sae)}.safetensors"
    if not path.is_file():
        measure(model, sae, neutral_texts(MEASURED_TEXTS)).save(path)
    return Facts.load(path)


def fingerprint(model: Model, sae: Sae) -> str:
    """Of the weights that the facts depend on, by samples of them: cheap, and another pair differs everywhere."""
    told = (sae.site, sae.writes, sae.architecture, sae.normalize, sae.scalar, sae.centred, sae.k)
    told += (sae.apply_b_dec_to_input, sae.pursuit, sae.temporal and (sae.temporal.heads, sae.temporal.k))
    digest = hashlib.sha256(f"{told} {sae.rescale_by_decoder_norm} {model.dtype} {model.start_plain}".encode())
    own = [value for _, value in sorted(sae.tensors())]
    for count, tensors in ((4096, own), (64, model.parameters_below(sae.writes))):
        for tensor in tensors:
            flat = tensor.detach().flatten()
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(flat[:: max(1, len(flat) // count)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]
