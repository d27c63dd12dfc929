"""From a few example sentences to the features that are the concept: those that detect it, those that cause it.

Detection. How rarely neutral text reaches an example's value is an empirical p-value. A feature's evidence is the mean
over the examples of -log p, of the sentence's maximum and of its mean, each capped: a few sentences that all surprise a
little tell more than one that surprises much. Six examples cannot tell the concept from a word that they happen to
share, so the neutral sentences that the first features together find most alike count too, with a smaller weight
(benchmarks/meaning_find.py). AUROC and calibrated F1 (arXiv 2605.31183, prior 1e-3) stand beside it.

Causes. A feature that detects need not cause. The best by evidence are put through the effect lens against the words
that set the examples apart, and the best of those write short continuations of neutral beginnings: how likely is it
that one of the words comes up within ten tokens. Those are first mentions; raising the likelihood of text that names
the thing already steers nothing. The published output score (arXiv 2505.20063) stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lancet import background as background_module
from lancet import effects
from lancet.algebra import Direction
from lancet.background import TOKENS, Background, Sentences, Sorted, statistics
from lancet.errors import UsageError
from lancet.scoring import auroc

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

CAP, BEYOND = 5.0, 0.01  # nats, so that no single sentence decides; weight of what lies above
ENDING = 3.0  # nats off a feature that is strongest at a sentence's closing mark, where much is summed up
LEADERS, ALIKE, ALIKE_WEIGHT = 8, 20, 0.4  # features that find the neutral sentences most alike; how many; their weight
PRIOR = 1e-3  # of the concept in the wild, for the calibrated F1
LENS = 100  # features put through the effect lens
WORDS, RARE = 12, 4.0  # at most so many set the examples apart; each so many times as frequent as in neutral text
DETECTS = 0.9  # AUROC from which a feature counts as a detector
CAUSES = 0.1  # added probability of a first mention from which it counts as a cause


@dataclass(frozen=True)
class Evidence:
    """One example in which a feature fires: which one, the token where it is strongest, and how strong."""

    example: int
    token: str
    value: float


@dataclass(frozen=True)
class Candidate:
    """A feature that may be the concept.

    Attributes:
        feature: its index.
        evidence: mean capped surprise over the examples, in nats.
        auroc: of sentence maxima, examples against the background; token_auroc: of tokens.
        f1: calibrated F1 of the sentence maxima at `threshold`.
        elsewhere: share of background sentences at or above the threshold.
        fires, says, logits: what it fires on, makes the model say, and promotes by the logit lens.
        lens: nats by which it makes the concept's words likelier than words in general; None where not measured.
        mention: probability that one of them comes up within ten tokens of a neutral beginning; plain: without it.
        output: the published output score; None where not measured.
        where: the examples in which it fires.
    """

    feature: int
    evidence: float
    auroc: float
    token_auroc: float
    f1: float
    threshold: float
    elsewhere: float
    fires: str = ""
    says: str = ""
    logits: str = ""
    lens: float | None = None
    mention: float | None = None
    plain: float | None = None
    output: float | None = None
    where: tuple[Evidence, ...] = ()

    @property
    def detects(self) -> bool:
        return self.auroc >= DETECTS

    @property
    def causes(self) -> bool:
        return self.mention is not None and self.plain is not None and self.mention - self.plain >= CAUSES

    def to_json(self) -> dict[str, Any]:
        """Its attributes, and `detects` and `causes`."""
        plain = {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(self).items()}
        return plain | {"where": [vars(e) for e in self.where], "detects": self.detects, "causes": self.causes}


@dataclass
class Found:
    """What `find` returns.

    Attributes:
        sae: where the features live.
        like: the examples.
        words: ids of the tokens that set the examples apart; says: the same as text.
        candidates: the best by evidence, first those that cause it too.
        together: the few features that detect it best as one; adds: AUROC with the first 1, 2, ... of them.
        baselines: AUROC, on these same examples, of DiffMean and LDA (each example left out in turn) and of the best
            single coordinate.
        diffmean: mean of the examples' values less the background's.
        blend: up to ten features, weighted, that together cause it; None where no feature does by the lens.
        notes: what the reader must know (cut texts, too few examples).
    """

    sae: Sae
    like: tuple[str, ...]
    words: tuple[int, ...]
    says: tuple[str, ...]
    candidates: list[Candidate]
    together: tuple[int, ...]
    adds: tuple[float, ...]
    baselines: dict[str, float]
    diffmean: Direction
    blend: Direction | None
    parts: tuple[tuple[int, float], ...] = ()
    notes: list[str] = field(default_factory=list)
    _lab: Any = None

    def detect(self, texts: Sequence[str]) -> Tensor:
        """[n] how much each text speaks for the concept: summed surprise of the `together` features, in nats.

        Texts are read alone, by the model as it is.
        """
        import torch

        base = background_module.of(self._lab.model, self.sae)
        rows = [self._lab.model.tokenize(text, most=min(self._lab.model.context, TOKENS)) for text in texts]
        found = statistics(self._lab.model, self.sae, rows)
        return _together(found, base, torch.tensor(self.together))

    def to_json(self) -> dict[str, Any]:
        """Everything but vectors."""
        return {
            "sae": self.sae.name,
            "site": str(self.sae.site),
            "like": list(self.like),
            "words": list(self.says),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "together": [{"feature": f, "auroc": round(a, 4)} for f, a in zip(self.together, self.adds, strict=True)],
            "baselines": {name: round(value, 4) for name, value in self.baselines.items()},
            "blend": [{"feature": f, "weight": round(w, 4)} for f, w in self.parts],
            "notes": self.notes,
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a candidate."""
        import pandas

        return pandas.DataFrame([{**c.to_json(), "where": len(c.where)} for c in self.candidates])

    def __str__(self) -> str:
        lines = [f"{len(self.like)} examples at {self.sae.site}; words that set them apart: {', '.join(self.says)}"]
        for c in self.candidates:
            does = " and ".join([word for word, is_so in (("detects", c.detects), ("causes", c.causes)) if is_so])
            lines.append(f"#{c.feature:<6} AUROC {c.auroc:.3f}  F1 {c.f1:.2f}  {c.fires}  {does or 'neither'}")
        return "\n".join(lines)


def find(
    lab: Lab,
    like: Sequence[str],
    unlike: Sequence[str] = (),
    at: str | None = None,
    sae: Any = None,
    top: int = 10,
    together: int = 4,
    blend: int = 10,
    causes: bool = True,
) -> Found:
    """Finds the features of a concept from example sentences.

    Args:
        like: sentences about it, one or more; six already do well.
        unlike: sentences that are like the examples but for the concept; they count beside the neutral background.
        at: characters in every example at which the concept sits: evidence from these tokens counts beside the
            sentences', and token figures are about them alone.
        sae: the site of the SAE; the default one where none is named.
        top: candidates kept.
        together: how many features detect as one.
        blend: the most features of the blend.
        causes: measure what the candidates cause (some seconds).

    Raises:
        UsageError: no example, an empty one, `at` not in an example, or a number below 1.
    """
    chosen, model = lab.sae(sae), lab.model
    for name, value in (("top", top), ("together", together), ("blend", blend)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    notes: list[str] = []
    rows, others = _rows(lab, like, "like", notes), _rows(lab, unlike, "unlike", notes)
    if not rows:
        raise UsageError("no example; give at least one sentence about the concept, better six")
    if len(rows) == 1:
        notes.append("one example cannot tell its concept from its other words; give a few more")
    base = background_module.of(model, chosen)
    own = statistics(model, chosen, rows)
    against = statistics(model, chosen, others) if others else None
    score = evidence(own, base) - ENDING * _at_the_end(rows, own, chosen.d_sae)
    if against is not None:
        score = score - evidence(against, base)
    score = score + ALIKE_WEIGHT * _alike(score, base)
    tokens = _at(rows, at)
    if at is not None:
        score = score + _evidence_at(own, base, tokens)
    count = min(max(LENS, top), chosen.d_sae)
    ranked = score.topk(count).indices
    ranked = ranked[score[ranked] > 0]
    if not len(ranked):
        raise UsageError("no feature fires on the examples more than on neutral text; give other examples")
    words = apart(lab, rows, others, base)
    says = tuple(dict.fromkeys(model.decode([i]).strip() for i in words))
    few = ranked[:together]
    maximum = (
        base.maximum
        if against is None
        else base.maximum.joined(against.feature, against.maximum, against.text, against.count)
    )
    found = Found(
        sae=chosen,
        like=tuple(like),
        words=tuple(words),
        says=says,
        candidates=[],
        together=tuple(few.tolist()),
        adds=_adds(own, base, few),
        baselines=_baselines(own.values, base.examples),
        diffmean=Direction(chosen.site, own.values.mean(0) - base.examples.mean(0), "DiffMean"),
        blend=None,
        notes=notes,
        _lab=lab,
    )
    measured: dict[int, dict[str, Any]] = {}
    if not words:
        notes.append("no word sets the examples apart, so nothing can be said of causes; give more examples")
    elif chosen.writes != chosen.site:
        notes.append("what a transcoder's features cause is not measured here; see `lancet ablate`")
    elif causes:
        measured = effects.measure(lab, chosen, ranked.tolist(), words, top)
        found.parts, found.blend = effects.blend(lab, chosen, own, base, words, blend)
    for f in [*ranked[:top].tolist(), *(f for f in measured if f not in ranked[:top].tolist())]:
        told = _candidate(lab, chosen, f, own, maximum, base, tokens, rows)
        found.candidates.append(Candidate(feature=f, evidence=float(score[f]), **told, **measured.get(f, {})))
    found.candidates.sort(key=lambda c: (-(c.detects and c.causes), -c.evidence))
    found.candidates = found.candidates[:top]
    return found


# ---- detection -----------------------------------------------------------------------------------------------------


def evidence(found: Sentences, base: Background) -> Tensor:
    """[d_sae] mean over texts of the capped surprise of maximum and mean; what lies above the cap decides ties."""
    import torch

    high = base.maximum.surprise(found.feature, found.maximum)
    broad = base.mean.surprise(found.feature, found.mean)
    told = high.clamp_max(CAP) + broad.clamp_max(CAP) + BEYOND * (high + broad)
    d_sae = len(base.maximum.begin) - 1
    return torch.zeros(d_sae).index_add_(0, found.feature, told.float()) / max(1, found.count)


def _at_the_end(rows: Sequence[Tokens], found: Sentences, d_sae: int) -> Tensor:
    """[d_sae] share of the texts in which a feature is strongest at the closing mark."""
    import torch

    last = torch.tensor([len(row) - 1 for row in rows])
    marks = torch.tensor([not any(map(str.isalnum, row.piece(len(row) - 1))) for row in rows])
    inside = (found.token_position == last[found.token_text]) & marks[found.token_text]
    text, feature, value = found.token_text[inside], found.token_feature[inside], found.token_value[inside]
    highest = dict(zip((found.text * d_sae + found.feature).tolist(), found.maximum.tolist(), strict=True))
    strongest = torch.tensor([highest[k] for k in (text * d_sae + feature).tolist()])
    here = value >= strongest
    return torch.zeros(d_sae).index_add_(0, feature[here], torch.ones(int(here.sum()))) / max(1, len(rows))


def _alike(score: Tensor, base: Background) -> Tensor:
    """[d_sae] evidence from the neutral sentences that the leading features together find most alike."""
    import torch

    leaders = score.topk(min(LEADERS, len(score))).indices
    values = base.maximum.dense(leaders)
    said = base.maximum.surprise(leaders.repeat(len(values)), values.flatten()).view(len(values), -1).sum(1)
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[said.topk(min(ALIKE, len(said))).indices] = True
    total = torch.zeros(len(score))
    for part in (base.maximum, base.mean):
        feature = torch.repeat_interleave(torch.arange(len(score)), part.begin.diff())
        inside = chosen[part.member.long()]
        surprise = part.surprise(feature[inside], part.value[inside]).clamp_max(CAP).float()
        total.index_add_(0, feature[inside], surprise)
    return total / int(chosen.sum())


def _evidence_at(found: Sentences, base: Background, tokens: Tensor) -> Tensor:
    """[d_sae] mean over texts of the capped surprise at the tokens that count, the strongest of each text's."""
    import torch

    inside = tokens[found.token_text, found.token_position]
    text, feature = found.token_text[inside], found.token_feature[inside]
    surprise = base.token.surprise(feature, found.token_value[inside]).clamp_max(CAP).float()
    d_sae = len(base.token.begin) - 1
    key, inverse = (text * d_sae + feature).unique(return_inverse=True)
    best = torch.zeros(len(key)).scatter_reduce_(0, inverse, surprise, "amax")
    return torch.zeros(d_sae).index_add_(0, key % d_sae, best) / max(1, found.count)


def _together(found: Sentences, base: Background, features: Tensor) -> Tensor:
    """[texts] summed surprise of a few features' maxima."""
    maxima = found.dense(features)
    which = features.repeat(found.count)
    return base.maximum.surprise(which, maxima.flatten()).view(found.count, -1).sum(1).float()


def _adds(own: Sentences, base: Background, features: Tensor) -> tuple[float, ...]:
    """AUROC of the first 1, 2, ... features as one, examples against background."""
    import numpy as np

    theirs = base.maximum.dense(features)
    out = []
    for n in range(1, len(features) + 1):
        first = features[:n]
        ours = _together(own, base, first)
        other = base.maximum.surprise(first.repeat(len(theirs)), theirs[:, :n].flatten()).view(-1, n).sum(1)
        scores = np.concatenate([ours.numpy(), other.numpy()])[:, None]
        out.append(float(auroc(scores, np.arange(len(scores)) < len(ours))[0]))
    return tuple(out)


def _candidate(
    lab: Lab,
    sae: Sae,
    feature: int,
    own: Sentences,
    against: Sorted,
    base: Background,
    tokens: Tensor,
    rows: Sequence[Tokens],
) -> dict[str, Any]:
    """What detection says of one feature."""
    import torch

    which = torch.tensor([feature])
    maxima = own.dense(which)[:, 0]
    single = torch.zeros(len(rows), max(map(len, rows)))
    mine = own.token_feature == feature
    single[own.token_text[mine], own.token_position[mine]] = own.token_value[mine]
    f1, threshold = calibrated_f1(maxima, against, which)
    where = []
    for example, row in enumerate(rows):
        position = int(single[example].argmax())
        if value := float(single[example, position]):
            where.append(Evidence(example, row.piece(position).strip(), round(value, 3)))
    return {
        "auroc": float(against.auroc(maxima[:, None], which)[0]),
        "token_auroc": float(base.token.auroc(single[tokens][:, None], which)[0]),
        "f1": f1,
        "threshold": threshold,
        "elsewhere": float(base.maximum.at_least(which, torch.tensor([threshold]))[0]) / base.maximum.population,
        "fires": lab.fires(feature, sae),
        "says": lab.says(feature, sae),
        "where": tuple(where),
    }


def calibrated_f1(positives: Tensor, against: Sorted, feature: Tensor) -> tuple[float, float]:
    """The best F1 of a feature and its threshold, as if the concept made up PRIOR of all text (arXiv 2605.31183):
    2 TP / (2 TP + c FP + FN) with c = q (1 - PRIOR) / (PRIOR (1 - q)), q the share of positives that were given.
    """
    import torch

    share = len(positives) / (len(positives) + against.population)
    c = share * (1 - PRIOR) / (PRIOR * (1 - share))
    thresholds = positives[positives > 0].unique()
    if not len(thresholds):
        return 0.0, 0.0
    true = (positives[None] >= thresholds[:, None]).sum(1).double()
    false = against.at_least(feature.expand(len(thresholds)), thresholds).double()
    f1 = 2 * true / (2 * true + c * false + (len(positives) - true))
    best = int(torch.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def _baselines(own: Tensor, neutral: Tensor) -> dict[str, float]:
    """AUROC of DiffMean and LDA from the same examples, each tried on the example left out; of the best coordinate."""
    import numpy as np
    import torch

    positive = np.arange(1 + len(neutral)) < 1
    centred = neutral - neutral.mean(0)
    covariance = centred.t() @ centred / max(1, len(neutral) - 1)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    inverse = torch.linalg.inv(covariance + ridge)
    out: dict[str, list[float]] = {"DiffMean": [], "LDA": []}
    for i in range(len(own) if len(own) > 1 else 0):
        rest = torch.cat([own[:i], own[i + 1 :]])
        difference = rest.mean(0) - neutral.mean(0)
        for name, direction in (("DiffMean", difference), ("LDA", inverse @ difference)):
            scores = torch.cat([own[i : i + 1], neutral]) @ direction
            out[name].append(float(auroc(scores[:, None].numpy(), positive)[0]))
    told = {f"{name} (left out in turn)": sum(values) / len(values) for name, values in out.items() if values}
    both = torch.cat([own, neutral]).numpy()
    each = auroc(both, np.arange(len(both)) < len(own))
    return told | {"best coordinate": float(np.maximum(each, 1 - each).max())}


# ---- words instead of sentences ------------------------------------------------------------------------------------

CARRIERS = (
    "They talked about {} all evening.",
    "I had never thought much about {} before.",
    "The first chapter of the book is about {}.",
    "My sister knows a lot about {}.",
    "We saw a film about {} last week.",
    "There is a long article on {} in the paper.",
    "He asked me what I knew of {}.",
    "Nothing interests her as much as {}.",
)
OTHER_WORDS = (
    "the new schedule", "his old shoes", "the tax form", "a broken chair", "the next meeting", "her neighbour's fence",
    "the price of paper", "an empty box",
)  # fmt: skip


def carriers(words: str) -> tuple[list[str], list[str]]:
    """Sentences that carry some words, and the same sentences with other words in their place.

    Raises:
        UsageError: no words.
    """
    if not words.strip():
        raise UsageError("no words; give some, such as 'golden gate bridge'")
    own = [carrier.format(words.strip()) for carrier in CARRIERS]
    return own, [carrier.format(other) for carrier, other in zip(CARRIERS, OTHER_WORDS, strict=True)]


# ---- examples ------------------------------------------------------------------------------------------------------


def _rows(lab: Lab, texts: Sequence[str], name: str, notes: list[str]) -> list[Tokens]:
    if isinstance(texts, str):
        raise UsageError(f"{name} must be a list of sentences, got one text; write {name}=[...]")
    rows = []
    most = min(lab.model.context, TOKENS)
    for i, text in enumerate(texts):
        if not text.strip():
            raise UsageError(f"{name} sentence {i + 1} is empty; leave it out or write it")
        row = lab.model.tokenize(text, most=most + 1)
        if len(row) > most:
            notes.append(f"{name} sentence {i + 1} is longer than {most} tokens and was cut there")
            row = lab.model.tokenize(text, most=most)
        rows.append(row)
    return rows


def _at(rows: Sequence[Tokens], at: str | None) -> Tensor:
    """[examples, longest] True at the tokens that count: those of `at`, or all but the start token."""
    import torch

    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, row in enumerate(rows):
        content = [p for p, role in enumerate(row.roles) if role != "start"]
        if at is not None:
            begin = row.text.find(at)
            if begin < 0:
                raise UsageError(f"{at!r} does not occur in example {i + 1} ({row.text[:60]!r}); --at must be in each")
            spans = [(p, row.spans[p]) for p in content]
            content = [p for p, (first, end) in spans if end > begin and first < begin + len(at) and end > first]
        out[i, content] = True
    return out


def apart(lab: Lab, rows: Sequence[Tokens], others: Sequence[Tokens], base: Background) -> list[int]:
    """Ids of the words that set examples apart: in more of them than neutral text, or the counter-examples, would lead
    one to expect."""
    counts: dict[int, int] = {}
    for row in rows:
        for i in set(row.ids):
            counts[i] = counts.get(i, 0) + 1
    against: dict[int, int] = {}
    for row in others:
        for i in set(row.ids):
            against[i] = against.get(i, 0) + 1
    least = 2 if len(rows) > 2 else 1
    scored = []
    for i, count in counts.items():
        text = lab.model.decode([i])
        if count < least or not text.startswith(" ") or len(text) < 4 or not text.strip().isalpha():
            continue
        share, usual = count / len(rows), (float(base.seen[i]) + 0.5) / (base.maximum.population + 1)
        usual = max(usual, against.get(i, 0) / max(1, len(others)))
        if share > RARE * usual:
            scored.append((share * math.log(share / usual), i))
    return [i for _, i in sorted(scored, reverse=True)[:WORDS]]
