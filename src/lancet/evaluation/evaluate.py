"""Scoring SAEs: one pass of the model for all of them wherever a pass can be shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lancet import massive
from lancet.atlas.corpus import Bad
from lancet.errors import MismatchError, UsageError
from lancet.evaluation import texts
from lancet.evaluation.scores import ENOUGH, Evaluation, Scores
from lancet.telling import counted

if TYPE_CHECKING:
    from lancet.evaluation.concepts import Bench
    from lancet.evaluation.reconstruction import Totals
    from lancet.model import Model
    from lancet.sae import Sae

TOKENS = 200_000
LOSS_TOKENS = 20_000  # each costs a pass of the whole model and two from the site on


def evaluate(
    model: Model,
    saes: Sae | Sequence[Sae] | Mapping[str, Sae],
    text: Sequence[str | Path] | None = None,
    *,
    tokens: int = TOKENS,
    loss_tokens: int = LOSS_TOKENS,
    concepts: bool = True,
    column: str = "text",
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Scores SAEs of one model on held-out text and against the concept bench.

    Args:
        saes: one, several with names of their own, or name -> SAE.
        text: files, folders or a data set, as `lancet harvest` takes them; the bench's held-out lines and passages
            where none is given.
        tokens: that are read at most; start tokens are neither read nor counted.
        loss_tokens: of these, about how many are also predicted: plain, spliced and zeroed, a pass each.
        concepts: whether to score against the bench.
        column: the field or column of JSONL or Parquet that holds the text.
        say: told what takes long; see `lancet.telling`.

    Raises:
        UsageError: no SAE, no text, a bad number, two SAEs of one name.
        MismatchError: an SAE of another width than its site in this model has.
    """
    from lancet.evaluation import decoder

    named = _named(saes)
    if tokens < 2 or loss_tokens < 1:
        raise UsageError(f"at least 2 tokens must be read and 1 predicted, got {tokens} and {loss_tokens}")
    for sae in named.values():
        _check(model, sae)
    source, documents, bad = _source(text, column)
    totals = _read(model, list(named.values()), documents, (tokens, loss_tokens), say)
    benches = _benches(model, list(named.values()), say) if concepts else [None] * len(named)
    say("comparing decoder rows")
    found = tuple(
        Scores.of(name, sae, total, decoder.similarity(sae), bench)
        for (name, sae), total, bench in zip(named.items(), totals, benches, strict=True)
    )
    read = found[0].tokens
    notes = []
    if text is None and read < tokens:
        notes.append(f"the bundled text has no more than {read:,} tokens; --text reads your own")
    if read < ENOUGH:
        notes.append(
            f"dead: never firing on {read:,} tokens; rare features need {ENOUGH:,} or more to be told from dead"
        )
    notes += _massive(found)
    notes += [_blank(each) for each in found if each.recovered is None]
    notes += [line for line in str(bad).splitlines() if line] if bad else []
    return Evaluation(model.name, source, read, found, tuple(notes))


def _named(saes: Sae | Sequence[Sae] | Mapping[str, Sae]) -> dict[str, Sae]:
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        listed = list(saes) if isinstance(saes, Sequence) else [saes]
        named = {sae.name: sae for sae in listed}
        if len(named) < len(listed):
            raise UsageError("two SAEs of one name; give a dictionary of names and SAEs")
    if not named:
        raise UsageError("no SAE to score; give at least one")
    return named


def _check(model: Model, sae: Sae) -> None:
    for site, width in ((sae.site, sae.d_in), (sae.writes, sae.d_out)):
        if (there := model.d_site(model.check_site(site))) != width:
            raise MismatchError(f"{sae.name} is {width} wide at {site}, where {model.name} has {there}; name its model")


def _source(text: Sequence[str | Path] | None, column: str) -> tuple[str, Iterable[str], Bad | None]:
    """What is read, in words; its documents; what counts the lines that cannot be read."""
    if text is None:
        return "the bench's held-out lines and passages", texts.bundled(), None
    bad = Bad()
    listed = [text] if isinstance(text, (str, Path)) else list(text)
    return ", ".join(map(str, listed)), texts.own(listed, column, bad), bad


def _read(
    model: Model, saes: Sequence[Sae], documents: Iterable[str], most: tuple[int, int], say: Callable[[str], None]
) -> list[Totals]:
    import torch

    from lancet.evaluation.reconstruction import Totals, measure

    totals = [Totals(torch.zeros(sae.d_sae, dtype=torch.long)) for sae in saes]
    with counted(say, "reading text", most[0]) as told:
        for chunk in texts.chunks(model, documents, most[0]):
            left = most[1] - totals[0].count
            end, held = 0, 0
            while end < len(chunk) and held < left:  # losses are measured on the first texts
                held += len(chunk[end])
                end += 1
            for rows, losses in ((chunk[:end], True), (chunk[end:], False)):
                measure(model, saes, rows, totals, losses)
            told(min(most[0] - 1, totals[0].tokens))
    return totals


def _benches(model: Model, saes: Sequence[Sae], say: Callable[[str], None]) -> list[Bench]:
    from lancet.evaluation import concepts, lines

    say("reading the concept bench")
    train, heldout = (lines.read(model, saes, *lines.labelled(part)) for part in ("train", "heldout"))
    say("scoring concepts")
    known = {site: concepts.beside(site, train, heldout) for site in {sae.site for sae in saes}}
    return [concepts.score(sae, i, train, heldout, known[sae.site]) for i, sae in enumerate(saes)]


def _massive(found: Sequence[Scores]) -> Iterator[str]:
    """What explained variance leaves out, once for all SAEs of a site."""
    by_site: dict[str, list[Scores]] = {}
    for each in found:
        by_site.setdefault(each.writes, []).append(each)
    for site, here in by_site.items():
        if count := here[0].massive:
            each = ", ".join(f"{s.explained_all:.3f}" + f" ({s.name})" * (len(here) > 1) for s in here)
            yield (
                f"{count:,} of {here[0].tokens:,} tokens at {site} have a norm over {massive.TIMES} times the median "
                f"and are left out of explained variance; with them it is {each}"
            )


def _blank(scores: Scores) -> str:
    if scores.losses is None:
        return f"{scores.name}: no text has two tokens to predict one from, so no loss was measured"
    return (
        f"{scores.name}: zeros at {scores.writes} cost no more than the model as it is, so there is no loss to recover"
    )
