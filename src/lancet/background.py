"""What features do on neutral text: what a finder holds examples against.

For every feature the maxima and means over neutral sentences and the activations of single tokens, sorted, so that the
question "how rarely does neutral text reach this value" is a search. Measured once for a pair and kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.files import cache_dir, check_safetensors, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.tokens import Tokens

SENTENCES = 1500  # about 30,000 tokens
TOKENS = 128  # of one sentence, the start token counted
BATCH = 32
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Sentences:
    """Statistics of some texts, sparse: entry i is about text `text[i]` and feature `feature[i]`.

    Attributes:
        count: how many texts.
        text, feature: [entries]; maximum, mean: [entries] over the text's tokens, start token left out.
        lengths: [count] tokens.
        values: [count, d_in] mean value at the site.
        token_text, token_position, token_feature, token_value: [active] every single activation.
    """

    count: int
    text: Tensor
    feature: Tensor
    maximum: Tensor
    mean: Tensor
    lengths: Tensor
    values: Tensor
    token_text: Tensor
    token_position: Tensor
    token_feature: Tensor
    token_value: Tensor

    def dense(self, features: Tensor, of: str = "maximum") -> Tensor:
        """[count, m] a statistic of some features, distinct ones."""
        import torch

        out = torch.zeros(self.count, len(features))
        order = features.argsort()
        at = torch.searchsorted(features[order], self.feature).clamp_max(len(features) - 1)
        inside = features[order][at] == self.feature
        out[self.text[inside], order[at[inside]]] = getattr(self, of)[inside]
        return out


def statistics(model: Model, sae: Sae, rows: Sequence[Tokens]) -> Sentences:
    """The statistics of tokenised texts, computed in batches of texts of like length."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    lengths, values = torch.zeros(len(rows)), torch.zeros(len(rows), sae.d_in)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for first in range(0, len(order), BATCH):
        which = torch.tensor(order[first : first + BATCH])
        batch = model.batch([rows[i] for i in which.tolist()])
        x = model.values(batch, [sae.site])[sae.site]
        keep = batch.content
        count = keep.sum(1).cpu()
        lengths[which] = count.float()
        values[which] = ((x.float() * keep[..., None]).sum(1).cpu()) / count[:, None].clamp_min(1)
        row, position = keep.nonzero(as_tuple=True)
        begin = 0
        for features in sae.features_of(x, keep):
            token = features.token + begin
            begin += features.shape[0]
            parts.append(
                (which[row[token].cpu()], position[token].cpu(), features.feature.cpu(), features.value.abs().cpu())
            )
    text, position, feature, value = (torch.cat(part) for part in zip(*parts, strict=True))
    key, inverse = (text * sae.d_sae + feature).unique(return_inverse=True)
    maximum = torch.zeros(len(key)).scatter_reduce_(0, inverse, value, "amax")
    mean = torch.zeros(len(key)).index_add_(0, inverse, value) / lengths[key // sae.d_sae].clamp_min(1)
    return Sentences(
        len(rows), key // sae.d_sae, key % sae.d_sae, maximum, mean, lengths, values, text, position, feature, value
    )


@dataclass(frozen=True)
class Sorted:
    """Values of features over a population in which most are zero, sorted within each feature.

    Attributes:
        begin: [d_sae + 1] where each feature's values begin; value: [entries] ascending within a feature.
        member: [entries] whose value it is.
        population: of how many values each feature's would be one, zeros included.
    """

    begin: Tensor
    value: Tensor
    member: Tensor
    population: int

    @classmethod
    def of(cls, feature: Tensor, value: Tensor, member: Tensor, d_sae: int, population: int) -> Sorted:
        """Sorts entries."""
        import torch

        order = value.argsort(stable=True)
        order = order[feature[order].argsort(stable=True)]
        begin = torch.searchsorted(feature[order], torch.arange(d_sae + 1))
        return cls(begin, value[order].contiguous(), member[order].int(), population)

    def joined(self, feature: Tensor, value: Tensor, member: Tensor, population: int) -> Sorted:
        """The same with more members."""
        import torch

        d_sae = len(self.begin) - 1
        own = torch.repeat_interleave(torch.arange(d_sae), self.begin.diff())
        members = torch.cat([self.member, member.int() + self.population])
        both = torch.cat([own, feature]), torch.cat([self.value, value])
        return Sorted.of(*both, members, d_sae, self.population + population)

    def dense(self, features: Tensor) -> Tensor:
        """[population, m] the values of some features."""
        import torch

        out = torch.zeros(self.population, len(features))
        for column, feature in enumerate(features.tolist()):
            part = slice(int(self.begin[feature]), int(self.begin[feature + 1]))
            out[self.member[part].long(), column] = self.value[part]
        return out

    def at_least(self, feature: Tensor, value: Tensor, above: bool = False) -> Tensor:
        """[n] how many members reach (or, `above`, exceed) each feature's value."""
        import torch

        top = float(self.value.max()) * 1.001 + 1e-6 if len(self.value) else 1.0
        own = torch.repeat_interleave(torch.arange(len(self.begin) - 1), self.begin.diff())
        key = own.double() + self.value.double() / top
        asked = feature.double() + value.double().clamp(0, top * 0.9999) / top
        under = torch.searchsorted(key, asked, right=above) - self.begin[feature]
        count = self.begin[feature + 1] - self.begin[feature] - under
        if above:
            return torch.where(value < 0, self.population, count)
        return torch.where(value <= 0, self.population, count)

    def surprise(self, feature: Tensor, value: Tensor) -> Tensor:
        """[n] -log of the empirical p-value of each feature's value: 0 where nothing fires."""
        return -(((self.at_least(feature, value) + 1) / (self.population + 1)).log())

    def auroc(self, scores: Tensor, features: Tensor) -> Tensor:
        """[m] how well each feature separates positives, scores [n, m], from the members; ties counted half."""
        n, m = scores.shape
        which = features.repeat(n)
        flat = scores.flatten()
        reach, exceed = self.at_least(which, flat), self.at_least(which, flat, above=True)
        below = (self.population - reach).double() + 0.5 * (reach - exceed).double()
        return (below / self.population).view(n, m).mean(0).float()


@dataclass(frozen=True)
class Background:
    """Features on neutral text.

    Attributes:
        maximum, mean, token: over sentences and over single tokens.
        activation: [d_sae] mean activation over tokens.
        seen: [vocab] in how many sentences each token id occurs.
        examples: [n, d_in] the sentences' mean values.
    """

    maximum: Sorted
    mean: Sorted
    token: Sorted
    activation: Tensor
    seen: Tensor
    examples: Tensor

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {"activation": self.activation, "seen": self.seen, "examples": self.examples}
        metadata = {}
        for name in ("maximum", "mean", "token"):
            each: Sorted = getattr(self, name)
            tensors |= {f"{name}.begin": each.begin, f"{name}.value": each.value, f"{name}.member": each.member}
            metadata[name] = str(each.population)
        with whole_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Background:
        """Reads what `save` wrote.

        Raises:
            DamagedError: the file is damaged.
        """
        from safetensors import safe_open

        check_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            get = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        parts = {
            name: Sorted(get[f"{name}.begin"], get[f"{name}.value"], get[f"{name}.member"], int(metadata[name]))
            for name in ("maximum", "mean", "token")
        }
        return cls(**parts, activation=get["activation"], seen=get["seen"], examples=get["examples"])


def neutral_sentences(count: int = SENTENCES) -> list[str]:
    """Single sentences of everyday text of many kinds, out of the bench's passages."""
    import random

    from lancet.bench import neutral_texts

    found = []
    for text in neutral_texts(2 * count, seed=3):
        found += [part for part in _SENTENCE_END.split(text) if 20 < len(part) < 300]
    random.Random(0).shuffle(found)
    return found[:count]


def measure(model: Model, sae: Sae, texts: Sequence[str]) -> Background:
    """The background of a pair on some sentences."""
    import torch

    rows = [model.tokenize(text, most=min(model.context, TOKENS)) for text in texts]
    found = statistics(model, sae, rows)
    tokens = int(found.lengths.sum())
    vocab = model.arch.vocab_size
    seen = torch.zeros(vocab, dtype=torch.int32)
    for row in rows:
        seen[torch.tensor(sorted(set(row.ids)))] += 1
    activation = torch.zeros(sae.d_sae).index_add_(0, found.token_feature, found.token_value) / tokens
    return Background(
        Sorted.of(found.feature, found.maximum, found.text, sae.d_sae, found.count),
        Sorted.of(found.feature, found.mean, found.text, sae.d_sae, found.count),
        Sorted.of(found.token_feature, found.token_value, found.token_text, sae.d_sae, tokens),
        activation,
        seen,
        found.values,
    )


def of(model: Model, sae: Sae) -> Background:
    """The background of a pair, measured when first needed and kept in the cache."""
    from lancet.facts import fingerprint

    path = cache_dir() / "background" / f"{fingerprint(model, sae)}.safetensors"
    if not path.is_file():
        measure(model, sae, neutral_sentences()).save(path)
    return Background.load(path)
