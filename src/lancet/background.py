"""What features do on neutral text: what a finder holds examples against.

For every feature the maxima and means over neutral sentences and the activations of single tokens. Measured once for a
pair and kept. All that is compared are sizes: an AbsTopK feature that fires at -5 fires as strongly as one at 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint, passes
from lancet.errors import DamagedError, LancetError
from lancet.files import cache_dir, check_safetensors, whole_file
from lancet.tails import Sorted
from lancet.telling import counted

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.model import Model
    from lancet.sae import Sae
    from lancet.tokens import Tokens

SENTENCES = 1500  # about 30,000 tokens
TOKENS = 128  # of one sentence, the start token counted
AT_ONCE = 256  # sentences whose single activations are held with all that is known of them
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PARTS = ("maximum", "mean", "token")


@dataclass(frozen=True)
class Sentences:
    """Statistics of some texts, sparse: entry i is about text `text[i]` and feature `feature[i]`.

    Attributes:
        count: how many texts.
        text, feature: [entries], sorted by text, then by feature; maximum, mean: [entries] of the sizes of activations
            over the text's tokens, start token left out.
        lengths: [count] tokens.
        values: [count, d_in] mean value at the site.
        token_text, token_position, token_feature, token_value: [active] every single activation, with its sign.
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

    lengths, values = torch.zeros(len(rows)), torch.zeros(len(rows), sae.d_in)
    active: list[tuple[Tensor, ...]] = []
    summed: list[tuple[Tensor, ...]] = []
    for piece in passes.through(model, sae, rows):
        row_text, row_position = piece.text.cpu(), piece.position.cpu()
        lengths.index_add_(0, row_text, torch.ones(len(row_text)))
        values.index_add_(0, row_text, piece.values[sae.site].float().cpu())
        token, feature, value = (
            part.cpu() for part in (piece.features.token, piece.features.feature, piece.features.value)
        )
        text = row_text[token]
        active.append((text, row_position[token], feature, value))
        key, inverse = (text * sae.d_sae + feature).unique(return_inverse=True)
        size = value.abs()
        maximum = torch.zeros(len(key)).scatter_reduce_(0, inverse, size, "amax")
        summed.append((key, maximum, torch.zeros(len(key)).index_add_(0, inverse, size)))
    values /= lengths[:, None].clamp_min(1)
    key, maximum, total = (torch.cat(part) for part in zip(*summed, strict=True))
    ordered = key.argsort()
    key, maximum, total = key[ordered], maximum[ordered], total[ordered]
    text = key // sae.d_sae
    mean = total / lengths[text].clamp_min(1)
    singles = (torch.cat(part) for part in zip(*active, strict=True))
    return Sentences(len(rows), text, key % sae.d_sae, maximum, mean, lengths, values, *singles)


@dataclass(frozen=True)
class Background:
    """Features on neutral text.

    Attributes:
        maximum, mean, token: over sentences and over single tokens.
        activation: [d_sae] mean activation over tokens, with its sign.
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
        for name in _PARTS:
            each: Sorted = getattr(self, name)
            tensors |= {f"{name}.begin": each.begin, f"{name}.value": each.value}
            if each.member is not None:
                tensors[f"{name}.member"] = each.member
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
            name: Sorted(
                get[f"{name}.begin"], get[f"{name}.value"], int(metadata[name]), member=get.get(f"{name}.member")
            )
            for name in _PARTS
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


def measure(model: Model, sae: Sae, texts: Sequence[str], say: Callable[[str], None] = lambda line: None) -> Background:
    """The background of a pair on some sentences: on the first of them, where all would take long.

    What grows with the text is held at 12 bytes an active feature of a token, whatever the SAE's width.

    Args:
        say: told how far it is (`telling.counted`).
    """
    import torch

    rows = [model.tokenize(text, most=min(model.context, TOKENS)) for text in texts]
    rows = passes.affordable(model, sae, rows)
    activation, tokens, lit = torch.zeros(sae.d_sae), 0, 0
    entries: list[tuple[Tensor, ...]] = []
    singles: list[tuple[Tensor, Tensor]] = []
    examples: list[Tensor] = []
    with counted(say, "reading sentences", len(rows)) as told:
        for first in range(0, len(rows), AT_ONCE):
            if lit > passes.ENTRIES:  # no sparse code, and far more than a machine wants to hold
                rows = rows[:first]
                break
            found = statistics(model, sae, rows[first : first + AT_ONCE])
            activation.index_add_(0, found.token_feature, found.token_value)
            tokens += int(found.lengths.sum())
            lit += len(found.token_value)
            entries.append((found.text + first, found.feature, found.maximum, found.mean))
            singles.append((found.token_feature.int(), found.token_value.abs()))
            examples.append(found.values)
            told(first)
    seen = torch.zeros(model.d_vocab, dtype=torch.int32)
    for row in rows:
        seen[torch.tensor(sorted(set(row.ids)))] += 1
    text, feature, maximum, mean = (torch.cat(part) for part in zip(*entries, strict=True))
    token_feature, token_value = (torch.cat(part) for part in zip(*singles, strict=True))
    return Background(
        Sorted.of(feature, maximum, sae.d_sae, len(rows), text),
        Sorted.of(feature, mean, sae.d_sae, len(rows), text),
        Sorted.of(token_feature, token_value, sae.d_sae, tokens),
        activation / max(1, tokens),
        seen,
        torch.cat(examples),
    )


def place(model: Model, sae: Sae) -> Path:
    """Where the background of a pair is kept."""
    return cache_dir() / "background" / f"{fingerprint.of_pair(model, sae)}.safetensors"


def of(model: Model, sae: Sae, say: Callable[[str], None] = lambda line: None) -> Background:
    """The background of a pair, measured when first needed and kept in the cache.

    A kept file that is damaged is measured anew, and a cache that cannot be written costs the same work again.

    Args:
        say: told before it is measured, how far it is, and when it was measured on less than all sentences.
    """
    path = place(model, sae)
    if path.is_file():
        try:
            return Background.load(path)
        except DamagedError:
            path.unlink()
    sentences = neutral_sentences()
    say(f"reading {len(sentences):,} neutral sentences with {sae.name}, to hold examples against (once)")
    found = measure(model, sae, sentences, say)
    if (read := found.maximum.population) < len(sentences):
        say(f"read {read:,} of them, as many as some minutes of this machine allow with {sae.d_sae:,} features")
    with suppress(LancetError):
        found.save(path)
    return found
