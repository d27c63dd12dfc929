"""What was measured about an SAE on its model: maxima, densities, the typical norm, what features fire on and say.

Shipped with the bundled SAEs; for any other they are measured once on a bundled text and kept in the cache. `2x` and
`0.5rn` rest on them, and so does the hiding of features that fire all the time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint, passes
from lancet.bench import neutral_texts
from lancet.errors import DamagedError, LancetError, MismatchError
from lancet.files import cache_dir, check_safetensors, whole_file
from lancet.telling import Say, counted

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Features, Sae

MEASURED_TEXTS = 200  # texts of the bench; about 15,000 tokens
FIRES = 5  # tokens kept that a feature fires on
FIRES_AT_ONCE = 8_000_000  # pairs of feature and token held before they are summed up
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
        fires_ids: [d_sae, FIRES] the tokens that hold most of the feature's activation, most first, -1 where there are
            no more; fires_shares: [d_sae, FIRES] how much of it each holds.
        effect_ids, effect_values: [d_sae, n] the tokens that the feature makes likelier and by how many nats, None
            where the effect lens has not been run over all features.
        effect_mean, effect_deviation: [vocab] what an average feature does there, in nats, and how much that varies.
        concepts: concept -> {"feature", "auroc", "blend"}; the model card's table, empty where there is none.
    """

    maximum: Tensor
    density: Tensor
    norm: float
    tokens: int
    fires_ids: Tensor | None = None
    fires_shares: Tensor | None = None
    effect_ids: Tensor | None = None
    effect_values: Tensor | None = None
    effect_mean: Tensor | None = None
    effect_deviation: Tensor | None = None
    concepts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        import torch
        from safetensors.torch import save_file

        types = {
            "fires_ids": torch.int32,
            "effect_ids": torch.int32,
            "maximum": torch.float32,
            "density": torch.float32,
        }
        tensors = {
            name: value.to(types.get(name, torch.float16)).cpu().contiguous()
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        told = {"norm": self.norm, "tokens": self.tokens, "concepts": self.concepts}
        with whole_file(path) as temporary:  # one key: the order of several is not the same in every process
            save_file(tensors, temporary, metadata={"facts": json.dumps(told)})

    @classmethod
    def load(cls, path: Path) -> Facts:
        """Reads what `save` wrote.

        Raises:
            DamagedError: the file is damaged.
        """
        from safetensors import safe_open

        check_safetensors(path)
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("facts", "null"))
            get = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        try:
            return cls(**get, **told)
        except TypeError as error:
            raise DamagedError(
                f"{path} holds no facts that this Lancet reads; delete it, and they are measured anew"
            ) from error


class Fires:
    """Sums up on which tokens each feature's activation lies, over any number of batches."""

    def __init__(self, d_sae: int, vocab: int) -> None:
        self.d_sae, self.vocab = d_sae, vocab
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._entries = 0

    def add(self, features: Features, ids: Tensor) -> None:
        """Counts active features in; `ids` [tokens] is the token at each of their rows."""
        key = features.feature * self.vocab + ids[features.token]
        self._parts.append(_summed(key, features.value.abs()))
        self._entries += len(self._parts[-1][0])
        if self._entries > FIRES_AT_ONCE:
            self._merge()

    def _merge(self) -> tuple[Tensor, Tensor]:
        import torch

        self._parts = [_summed(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))]
        self._entries = 0
        return self._parts[0]

    def top(self, count: int = FIRES) -> tuple[Tensor, Tensor]:
        """[d_sae, count] token ids, most first and -1 where there are no more, and their shares of the activation."""
        import torch

        ids = torch.full((self.d_sae, count), -1)
        shares = torch.zeros(self.d_sae, count)
        if not self._parts:
            return ids, shares
        key, mass = (part.cpu() for part in self._merge())
        order = mass.argsort(descending=True, stable=True)
        order = order[(key[order] // self.vocab).argsort(stable=True)]  # by feature, the most first
        feature, token, mass = key[order] // self.vocab, key[order] % self.vocab, mass[order]
        begin = torch.searchsorted(feature, torch.arange(self.d_sae))
        rank = torch.arange(len(feature)) - begin[feature]
        whole = torch.zeros(self.d_sae).index_add_(0, feature, mass)
        kept = rank < count
        ids[feature[kept], rank[kept]] = token[kept]
        shares[feature[kept], rank[kept]] = mass[kept] / whole[feature[kept]]
        return ids, shares


def _summed(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    distinct, inverse = key.unique(return_inverse=True)
    return distinct, value.new_zeros(len(distinct)).index_add_(0, inverse, value)


def measure(model: Model, sae: Sae, texts: Sequence[str], say: Say = lambda line: None) -> Facts:
    """Maxima, densities and the typical norm over texts: over the first of them, where all would take long.

    Args:
        say: told how far it is (`telling.counted`).
    """
    import torch

    maximum = torch.zeros(sae.d_sae, device=model.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.long, device=model.device)
    fires = Fires(sae.d_sae, model.d_vocab)
    norms, tokens = [], 0
    rows = [model.tokenize(text, most=model.context) for text in texts]
    rows = passes.affordable(model, sae, rows)
    with counted(say, "reading texts", len(rows)) as told:
        for piece in passes.through(model, sae, rows, [sae.writes], told, passes.ENTRIES):
            features = piece.features
            maximum.scatter_reduce_(0, features.feature, features.value, "amax")
            fires.add(features, piece.ids)
            fired += torch.bincount(features.feature, minlength=sae.d_sae)
            norms.append(piece.values[sae.writes].float().norm(dim=1))
            tokens += len(piece.ids)
    density = fired.cpu() / tokens
    return Facts(maximum.cpu(), density, float(torch.cat(norms).median()), tokens, *fires.top())


def of(model: Model, sae: Sae, shipped: Path | None = None, say: Say = lambda line: None) -> Facts:
    """The facts of a pair: shipped, else kept in the cache, else measured now and kept.

    A kept file that is damaged is measured anew, and a cache that cannot be written costs the same work again.

    Args:
        say: told before they are measured, how far it is, and on what they were measured.

    Raises:
        MismatchError: the shipped facts are another SAE's.
        DamagedError: the shipped facts are damaged.
    """
    if shipped is not None and shipped.is_file():
        facts = Facts.load(shipped)
        if len(facts.maximum) != sae.d_sae:
            raise MismatchError(
                f"{shipped} is about {len(facts.maximum)} features, {sae.name} has {sae.d_sae}: it is another SAE's; "
                f"delete it, and facts are measured anew"
            )
        return facts
    path = cache_dir() / "facts" / f"{fingerprint.of_pair(model, sae)}.safetensors"
    if path.is_file():
        try:
            return Facts.load(path)
        except DamagedError:
            path.unlink()
    say(f"measuring how strong and how often the features of {sae.name} fire (once)")
    facts = measure(model, sae, neutral_texts(MEASURED_TEXTS), say)
    never = int((facts.maximum == 0).sum())
    say(f"measured on {facts.tokens:,} tokens of bundled text; {never:,} of {sae.d_sae:,} features never fired there")
    with suppress(LancetError):
        facts.save(path)
        return Facts.load(path)
    return facts
