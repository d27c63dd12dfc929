"""Finding a dose: which edits are tried, what decides, and keeping what was found.

Every way of saying the concept (the target, or the blends that examples suggest; the baselines) is swept over strengths
on the calibration prompts, each row of the sweep in the same batches. Each way's best strength is then told on other
prompts and seeds; what was seen there decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lancet import naming
from lancet.algebra import Direction, Ref
from lancet.dose import Dose, Limits, Row, best, measured
from lancet.edit import SIGNS, Edit, Operation
from lancet.errors import UsageError
from lancet.prompts import CALIBRATION, REPORT
from lancet.span import Span
from lancet.sweep import write
from lancet.units import Amount
from lancet.ways import Way, compared, suggested, target_way

if TYPE_CHECKING:
    from lancet.find import Found
    from lancet.generate import Sampling
    from lancet.lab import Edits, Lab, Prompt
    from lancet.saying import Detector
    from lancet.sweep import Text

TOKENS, SEEDS, REPORT_SEEDS = 40, 1, 4
FINALISTS, AGAIN = 3, 2  # the best strengths are written again, with so many times the seeds
FIRST_REPORT_SEED = 1000  # the report shares no draws with the calibration
EXAMPLES = 12  # training lines of a concept of the bench that stand for it where no examples are given


Arm = tuple[str, str]  # a way's name and an edit of it, in the notation


def dose(
    lab: Lab,
    target: int | str | Direction | None = None,
    prompts: Sequence[Prompt] = (),
    like: Sequence[str] = (),
    keywords: Sequence[str] = (),
    strengths: Sequence[str | float | Amount] = (),
    operations: Sequence[Operation] = ("add", "set"),
    span: str = "all",
    calibration: Sequence[Prompt] = CALIBRATION,
    seeds: int = SEEDS,
    report_seeds: int = REPORT_SEEDS,
    tokens: int = TOKENS,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    baselines: bool | Sequence[str] = True,
    name: str = "",
    keep: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Dose:
    """Finds the recommended dose of a feature, blend, expression or Direction.

    Args:
        target: what is dosed. None: what the examples suggest, at the sites of all open SAEs: the blend that
            `lab.find` makes, the same fitted to first mentions, and the feature that detects and causes it best.
        prompts: what the dose is reported on; ten bundled neutral ones where none is given.
        like: example sentences about the concept. A concept of the bench brings its own, and its keywords.
        keywords: words of which a text must have one; they decide. Without them the examples' own detector does, and
            without examples the target itself, fired or reached by the finished text read alone.
        strengths: amounts to try (`0.4rn`, `2x`, `80`); a grid in rn, and in x for setting single features, where none
            are given.
        operations: "add", "set" or both.
        span: where the edits act, as after the @ of an edit.
        calibration: the prompts that the dose is chosen on; those among `prompts` are left out.
        seeds, report_seeds: continuations of each prompt there and in the report.
        tokens: of each continuation.
        limits: what a dose may cost.
        baselines: also try, each at its own best dose: DiffMean, DiffMean through the SAE, the likelihood gradient
            (all from examples), Neuronpedia's orthogonal method, and a plain prompt prefix; or the names of some.
        name: names what is recommended, so that edits can use it.
        keep: keep the dose, so that `+= auto` and `= auto` work from now on.

    Raises:
        UsageError, UnknownName: nothing to dose, nothing to judge by, a target or strength that cannot be meant.
    """
    from lancet.find import find

    limits, where = limits or Limits(), _span(span)
    amounts = [Amount.parse(strength) for strength in strengths]
    if any(amount.unit == "auto" for amount in amounts) or not set(operations) <= {"add", "set"} or not operations:
        raise UsageError(f"a sweep needs amounts such as 0.4rn and add or set, got {strengths}, {operations}")
    for what, count in (("seeds", seeds), ("report_seeds", report_seeds), ("tokens", tokens)):
        if count < 1:
            raise UsageError(f"{what} must be at least 1, got {count}")
    like, keywords, notes = _concept(target, like, keywords)
    if target is None and not like:
        raise UsageError("nothing to dose; give a target such as '#12' or bridge, or examples (like)")
    told = tuple(prompts) or REPORT
    tried = [prompt for prompt in calibration if prompt not in told]
    if not tried:
        raise UsageError("no calibration prompt is left: those to be reported on are no others; give other prompts")
    say("finding what to try")
    found = {sae.site: find(lab, like, sae=sae.site) for sae in lab.saes} if like else {}
    own = (
        [target_way(lab, target, amounts, operations)]
        if target is not None
        else suggested(lab, list(found.values()), keywords, amounts, operations)
    )
    if not own:
        raise UsageError("no feature makes the examples' words likelier; give more examples, or a target")
    everything = [*own]
    if baselines:
        others = compared(lab, own[0], like, keywords, amounts)
        everything += [way for way in others if baselines is True or way.name in baselines]
    detectors, words = _detectors(lab, list(found.values()), keywords, own[0])
    sweep = Sweep(
        {(way.name, str(edit or "")): (way, edit) for way in everything for edit in way.edits(where)},
        limits,
        lambda edits, on, draws, prefixes: write(
            lab, edits, on, draws, tokens, detectors, sampling, say, prefixes=prefixes
        ),
    )
    rows, chosen, others = sweep.calibrate(tried, seeds)
    draws = range(FIRST_REPORT_SEED, FIRST_REPORT_SEED + report_seeds)
    report = sweep.rows([key(row) for row in (chosen, *others) if row], told, draws)
    out = Dose(
        target=str(target) if target is not None else "what the examples suggest",
        detectors=words,
        limits=limits,
        calibration=rows,
        chosen=chosen,
        report=report,
        notes=[*notes, *(note for each in found.values() for note in each.notes)],
        recipe=lab.recipe() | {"calibration": list(map(_shown, tried)), "report": list(map(_shown, told))},
    )
    if chosen is None:
        out.notes.append("no strength says the concept within the limits; try other limits, examples or another target")
    elif keep:
        _keep(lab, out, next(way for way in own if way.name == chosen.way), name)
    return out


def key(row: Row) -> Arm:
    """Which arm of the sweep a row is about."""
    return row.way, row.edit


@dataclass(frozen=True)
class Sweep:
    """Arms (strengths of ways) that can be written and measured on any prompts.

    Attributes:
        arms: arm -> its way and edit.
        limits: what a dose may cost.
        texts: writes some arms: (edits, prompts, seeds, prefixes) -> texts, "plain" among them.
    """

    arms: Mapping[Arm, tuple[Way, Edit | None]]
    limits: Limits
    texts: Callable[[dict[str, Edits], Sequence[Prompt], range, dict[str, str]], dict[str, list[Text]]]

    def rows(self, arms: Sequence[Arm], prompts: Sequence[Prompt], seeds: range) -> list[Row]:
        """The plain text's row, then one for each arm."""
        called = {f"{way}: {edit}": (way, edit) for way, edit in arms}
        edits: dict[str, Edits] = {name: self.arms[arm][1] for name, arm in called.items()}
        prefixes = {name: prefix for name, arm in called.items() if (prefix := self.arms[arm][0].prefix)}
        texts = self.texts(edits, prompts, seeds, prefixes)
        plain = texts["plain"]
        out = [measured("plain", "", "", plain, plain, self.limits)]
        for name, arm in called.items():
            way, edit = self.arms[arm]
            out.append(measured(way.name, arm[1], str(edit.amount) if edit else "", texts[name], plain, self.limits))
        return out

    def calibrate(self, prompts: Sequence[Prompt], seeds: int) -> tuple[list[Row], Row | None, list[Row]]:
        """All rows, the recommended one (None where none fits the limits), and each baseline's best.

        A handful of texts flatters the luckiest of many strengths: the best are written again with other draws, and
        the choice is among those, on all their texts.
        """
        rows = {key(row): row for row in self.rows(list(self.arms), prompts, range(seeds))}
        own = {way.name for way, _ in self.arms.values() if way.own}
        baselines = list(dict.fromkeys(way.name for way, _ in self.arms.values() if not way.own))
        finalists = _top([row for row in rows.values() if row.way in own], FINALISTS)
        for name in baselines:
            finalists += _top([row for row in rows.values() if row.way == name], FINALISTS - 1)
        plain, *_ = rows.values()
        if not finalists:
            return list(rows.values()), None, []
        plain_again, *again = self.rows([key(row) for row in finalists], prompts, range(seeds, (1 + AGAIN) * seeds))
        for row, more in zip(finalists, again, strict=True):
            texts, others = [*row.texts, *more.texts], [*plain.texts, *plain_again.texts]
            rows[key(row)] = measured(row.way, row.edit, row.amount, texts, others, self.limits)
        sure = [rows[key(row)] for row in finalists]
        chosen = best([row for row in sure if row.way in own], self.limits)
        compared = [best([row for row in sure if row.way == name], self.limits) for name in baselines]
        return list(rows.values()), chosen, [row for row in compared if row]


def _top(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows with the best scores above 0."""
    return sorted((row for row in rows if row.score > 0), key=lambda row: -row.score)[:count]


# ---- what decides --------------------------------------------------------------------------------------------------


def _concept(target: object, like: Sequence[str], keywords: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Examples and keywords: those given, or those of the bench where the target is a concept of it."""
    from lancet import bench

    for what, given in (("like", like), ("keywords", keywords)):
        if isinstance(given, str):
            raise UsageError(f"{what} must be a list, got one text; write {what}=[...]")
        if any(not text.strip() for text in given):
            raise UsageError(f"{what} has an empty entry; leave it out")
    known = bench.concepts().get(target) if isinstance(target, str) else None
    if known is None or (like and keywords):
        return list(like), [word.strip() for word in keywords], []
    templates = known.part("train")[:EXAMPLES]
    lines = [bench.expand(template, random.Random(f"dose {i}")) for i, template in enumerate(templates)]
    note = f"keywords and examples not given are those of the bench's concept {known.name}"
    # Someone who gives either knows what he means by the name: nothing of the bench's may decide beside it.
    return (list(like), list(keywords), []) if like or keywords else (lines, list(known.keywords), [note])


def _detectors(
    lab: Lab, found: Sequence[Found], keywords: Sequence[str], way: Way
) -> tuple[dict[str, Detector], dict[str, str]]:
    from lancet import saying

    out: dict[str, Detector] = {}
    words: dict[str, str] = {}
    if keywords:
        out["keywords"], words["keywords"] = saying.keywords(keywords), ", ".join(keywords)
    if found:
        out["examples"], words["examples"] = saying.examples(found[0])
    if not out:
        assert way.target is not None
        out["itself"], words["itself"] = saying.itself(lab, way.target)
    return out, words


# ---- keeping it ----------------------------------------------------------------------------------------------------


def _keep(lab: Lab, found: Dose, way: Way, name: str) -> None:
    """Keeps the best amount of each operation, under the name where one is given."""
    if isinstance(way.target, Direction) and not name:
        found.notes.append(f"{way.target.recipe} has no name that a dose could be kept with; give one (name=...)")
        return
    assert way.target is not None
    amounts: dict[str, Amount] = {}
    for operation in way.strengths:
        sign = next(sign for sign, other in SIGNS.items() if other == operation)
        rows = [row for row in found.calibration if row.way == way.name and row.sign == sign]
        if row := found.chosen if found.chosen and found.chosen.sign == sign else best(rows, found.limits):
            amounts[sign] = Amount.parse(row.amount)
    if name:
        lab.name(name, way.target if isinstance(way.target, Direction) else str(way.target), force=True)
    kept_with = Ref(name=name) if name else way.target
    assert not isinstance(kept_with, Direction)
    from lancet import doses

    naming.keep_dose(doses.owner(lab, kept_with), kept_with, doses.written(amounts))
    found.kept = {sign: str(amount) for sign, amount in amounts.items()}


def _span(text: str) -> Span:
    from lancet.grammar import parse_edit

    return parse_edit(f"#0 += 1 @ {text}").span


def _shown(prompt: Prompt) -> Any:
    return prompt.text if hasattr(prompt, "text") else prompt  # type: ignore[union-attr]
