"""From a few example sentences, or words, to the features that are the concept: those that detect it (`detect`), and
those that cause it (`effects`).

A feature that detects need not cause. The best by evidence are put through the effect lens against the words that set
the examples apart, and the best of those write short continuations of neutral beginnings: how likely is it that one of
the words comes up within ten tokens. Those are first mentions; raising the likelihood of text that names the thing
already steers nothing. The published output score (arXiv 2505.20063) stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lancet import background, detect, effects, examples, naming
from lancet.algebra import Direction
from lancet.background import TOKENS, Background, Sentences, statistics
from lancet.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.tokens import Tokens

LENS = 100  # features put through the effect lens
SAYERS = 5  # features listed that say the words, whether or not they detect anything
DETECTS = 0.9  # AUROC from which a feature counts as a detector
CAUSES = 0.1  # added probability of a first mention from which it counts as a cause
NEAR = 0.95  # of the best's evidence, from which a feature that causes comes before those that do not


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
        evidence: what speaks for it (`detect.score`), in nats.
        auroc: of sentence maxima, examples against neutral sentences; unlike_auroc: against the counter-examples, None
            without; token_auroc: of tokens (those of `at`, or all), against neutral tokens.
        f1: calibrated F1 of the sentence maxima at `threshold`; token_f1: of the tokens, at the best one of theirs.
        elsewhere: share of neutral sentences at or above the threshold.
        fires, says, logits: what it fires on, makes the model say, and promotes by the logit lens.
        lens: nats by which it makes the concept's words likelier than words in general; None where not measured.
        mention: probability that one of them comes up within ten tokens of a neutral beginning; plain: without it.
        output: the published output score; None where not measured.
        told: nats by which it makes the words likelier, by the look-up among all features; None for the others.
        sign: -1 for a feature of an AbsTopK SAE that fires below zero in the examples, which is then what is meant.
        where: the examples in which it fires.
        name: what the user calls it; described: the best description kept of it; "" where there is none.
    """

    feature: int
    evidence: float
    auroc: float
    token_auroc: float
    f1: float
    token_f1: float
    threshold: float
    elsewhere: float
    unlike_auroc: float | None = None
    fires: str = ""
    says: str = ""
    logits: str = ""
    lens: float | None = None
    mention: float | None = None
    plain: float | None = None
    output: float | None = None
    told: float | None = None
    sign: int = 1
    where: tuple[Evidence, ...] = ()
    name: str = ""
    described: str = ""

    @property
    def detects(self) -> bool:
        return min(self.auroc, 1.0 if self.unlike_auroc is None else self.unlike_auroc) >= DETECTS

    @property
    def causes(self) -> bool:
        return self.mention is not None and self.plain is not None and self.mention - self.plain >= CAUSES

    @property
    def does(self) -> str:
        """ "detects", "causes", "both" or "neither"."""
        if self.detects and self.causes:
            return "both"
        return "detects" if self.detects else "causes" if self.causes else "neither"

    def to_json(self) -> dict[str, Any]:
        """Its attributes, and `detects` and `causes`."""
        plain = {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(self).items()}
        return plain | {"where": [vars(e) for e in self.where], "detects": self.detects, "causes": self.causes}


@dataclass
class Found:
    """What `find` returns.

    Attributes:
        sae: where the features live.
        like, unlike: the examples and counter-examples; asked: the words that they carry, "" for given sentences.
        words: ids of the tokens that set the examples apart; says: the same as text.
        candidates: the best by evidence; of those that come near the best, first such as cause it too.
        sayers: the features that make the words likelier than any others do and are not among the candidates.
        together: the few features that detect it best as one; adds: AUROC with the first 1, 2, ... of them.
        baselines: AUROC, on these same examples, of DiffMean and LDA (each example left out in turn) and of the best
            single coordinate.
        diffmean: mean of the examples' values less the background's, at the site that the SAE reads.
        blend: up to ten features, weighted, that together cause it, and `parts` of it; None where no feature does by
            the lens.
        notes: what the reader must know (cut texts, too few examples).
    """

    sae: Sae
    like: tuple[str, ...]
    unlike: tuple[str, ...]
    asked: str
    words: tuple[int, ...]
    says: tuple[str, ...]
    candidates: list[Candidate]
    sayers: list[Candidate]
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

        base = background.of(self._lab.model, self.sae)
        rows = [self._lab.model.tokenize(text, most=min(self._lab.model.context, TOKENS)) for text in texts]
        return detect.together(statistics(self._lab.model, self.sae, rows), base, torch.tensor(self.together))

    def to_json(self) -> dict[str, Any]:
        """Everything but vectors."""
        return {
            "sae": self.sae.name,
            "site": str(self.sae.site),
            "asked": self.asked,
            "like": list(self.like),
            "unlike": list(self.unlike),
            "words": list(self.says),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "sayers": [candidate.to_json() for candidate in self.sayers],
            "together": [{"feature": f, "auroc": round(a, 4)} for f, a in zip(self.together, self.adds, strict=True)],
            "baselines": {name: round(value, 4) for name, value in self.baselines.items()},
            "blend": [{"feature": f, "weight": round(w, 4)} for f, w in self.parts],
            "notes": self.notes,
        }

    def to_frame(self) -> Any:
        """A pandas data frame, one row a candidate, those that only say it last."""
        import pandas

        return pandas.DataFrame([{**c.to_json(), "where": len(c.where)} for c in (*self.candidates, *self.sayers)])

    def __str__(self) -> str:
        lines = [f"{len(self.like)} examples at {self.sae.site}; words that set them apart: {', '.join(self.says)}"]
        for c in (*self.candidates, *self.sayers):
            lines.append(f"#{c.feature:<6} {c.does:<8} AUROC {c.auroc:.3f}  F1 {c.f1:.2f}  {c.fires}")
        return "\n".join(lines)


def find(
    lab: Lab,
    like: Sequence[str] | str,
    unlike: Sequence[str] = (),
    at: str | None = None,
    sae: Any = None,
    top: int = 10,
    together: int = 4,
    blend: int = 10,
    causes: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Finds the features of a concept from example sentences, or from words.

    Args:
        like: sentences about it, one or more; six already do well. Or words in one string, such as "golden gate
            bridge": they are read in carrier sentences against the same sentences with other words, and looked up among
            the effects of all features.
        unlike: sentences that are like the examples but for the concept; what speaks for them speaks against.
        at: characters in every example at which the concept sits: evidence from these tokens counts beside the
            sentences', and token figures are about them alone.
        sae: the site of the SAE; the default one where none is named.
        top: candidates kept.
        together: how many features detect as one.
        blend: the most features of the blend.
        causes: measure what the candidates cause (some seconds).
        say: told when something takes long the first time.

    Raises:
        UsageError: no example, an empty one, `at` not in an example, a number below 1, or nothing found.
    """
    chosen, model = lab.sae(sae), lab.model
    for name, value in (("top", top), ("together", together), ("blend", blend)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    asked = ""
    if isinstance(like, str):
        if unlike or at is not None:
            raise UsageError("words bring their own counter-examples and place; leave unlike and at out, or give "
                             "sentences in a list")  # fmt: skip
        asked, at = like.strip(), like.strip()
        like, groups_unlike = examples.carriers(like)
        unlike = [text for group in groups_unlike for text in group]
    else:
        groups_unlike = [unlike] if unlike else []
    notes: list[str] = []
    rows = examples.rows(model, like, "like", notes)
    others = [examples.rows(model, group, "unlike", notes) for group in groups_unlike]
    if not rows:
        raise UsageError("no example; give at least one sentence about the concept, better six")
    if len(rows) == 1:
        notes.append("one example cannot tell its concept from its other words; give a few more")
    tokens = examples.places(rows, at)
    base = background.of(model, chosen, say)
    own = statistics(model, chosen, rows)
    against = [statistics(model, chosen, group) for group in others]
    score = detect.score(rows, own, against, base, None if at is None else tokens)
    told_at = detect.together_at(own, base, score.topk(min(detect.LEADERS, len(score))).indices, tokens.shape)
    apart = examples.apart(model, rows, [row for group in others for row in group], base, told_at)
    if not asked and apart:  # the words that the first features speak at choose among the features in turn
        score = score + detect.WORD_WEIGHT * detect.evidence_at(own, base, examples.marked(rows, apart))
    ranked = score.topk(min(max(LENS, top), chosen.d_sae)).indices
    ranked = ranked[score[ranked] > 0]
    if not len(ranked):
        raise UsageError("no feature fires on the examples more than on neutral text; give other examples")
    few = ranked[:together]
    groups = (examples.word_ids(model, asked, base) if asked else []) or [[i] for i in apart]
    words = tuple(dict.fromkeys(i for ids in groups for i in ids))
    found = Found(
        sae=chosen,
        like=tuple(like),
        unlike=tuple(unlike),
        asked=asked,
        words=words,
        says=tuple(dict.fromkeys(model.decode([i]).strip() for i in words)),
        candidates=[],
        sayers=[],
        together=tuple(few.tolist()),
        adds=detect.adds(own, base, few),
        baselines=detect.baselines(own.values, base.examples),
        diffmean=Direction(chosen.site, own.values.mean(0) - base.examples.mean(0), "DiffMean"),
        blend=None,
        notes=notes,
        _lab=lab,
    )
    likeliest = ranked.tolist()
    told: dict[int, float] = {}
    measured: dict[int, dict[str, Any]] = {}
    if not words:
        why = "the vocabulary has no token for these words" if asked else "no word sets the examples apart"
        notes.append(f"{why}, so what causes it cannot be measured; give {'' if asked else 'more '}example sentences")
    elif causes:
        told = effects.saying(lab, chosen, groups, SAYERS, notes) if asked else {}
        features = [*likeliest, *(f for f in told if f not in likeliest)]
        signs = [_sign(own, f) for f in features]
        measured = effects.measure(lab, chosen, features, signs, words, [*likeliest[:top], *told])
        found.parts, found.blend = effects.blend(lab, chosen, own, base, words, blend)
    looked_at = dict.fromkeys([*likeliest[:top], *measured, *told])
    names, described = naming.load(chosen), lab.described(looked_at, chosen)
    listed = [
        replace(
            _candidate(lab, chosen, f, own, against, base, tokens, rows),
            evidence=float(score[f]),
            told=told.get(f),
            name=names.of_feature(f),
            described=described.get(f, ""),
            **measured.get(f, {}),
        )
        for f in looked_at
    ]
    detected = [c for c in listed if score[c.feature] > 0]
    near = NEAR * max(c.evidence for c in detected)
    found.candidates = sorted(
        detected, key=lambda c: (not (c.detects and c.causes and c.evidence >= near), -c.evidence)
    )[:top]
    kept = {c.feature for c in found.candidates}
    found.sayers = sorted((c for c in listed if c.told and c.feature not in kept), key=lambda c: -(c.told or 0))
    return found


def _sign(own: Sentences, feature: int) -> int:
    """Which way a feature fires in the examples."""
    return -1 if float(own.token_value[own.token_feature == feature].sum()) < 0 else 1


def _candidate(
    lab: Lab,
    sae: Sae,
    feature: int,
    own: Sentences,
    against: Sequence[Sentences],
    base: Background,
    tokens: Tensor,
    rows: Sequence[Tokens],
) -> Candidate:
    """What detection says of one feature."""
    figures = detect.figures(own, against, base, tokens, feature)
    each = detect.at_tokens(own, feature, tokens.shape)
    sign = _sign(own, feature)
    strongest = each.abs().argmax(1).tolist()
    where = tuple(
        Evidence(i, row.piece(p).strip(), round(float(each[i, p]), 3))
        for i, (row, p) in enumerate(zip(rows, strongest, strict=True))
        if each[i, p]
    )
    # What facts say of a feature is about its positive side.
    fires, says = (lab.fires(feature, sae), lab.says(feature, sae)) if sign > 0 else ("", "")
    return Candidate(feature=feature, evidence=0.0, fires=fires, says=says, sign=sign, where=where, **figures._asdict())
