"""`lancet eval`: how good SAEs are, beside each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lancet.cli import show
from lancet.cli.opening import Choice
from lancet.cli.options import opens_many
from lancet.errors import UsageError

if TYPE_CHECKING:
    from lancet.evaluation.concepts import Bench, Detector
    from lancet.evaluation.scores import Evaluation, Scores
    from lancet.sae import Sae

LOWEST = 10  # concepts listed where not all are asked for


@opens_many
def command(
    saes: Annotated[
        list[str] | None,
        typer.Argument(help="RELEASE/ID (see `lancet saes`), sites or folders, all of one model; left out, its own."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Files or folders of held-out text, as harvest takes them; left out, bundled text."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Read no more than so many, such as 200k or 1M.")] = "200k",
    loss_tokens: Annotated[
        str, typer.Option(help="On about so many of them, the first, losses and KL are measured.")
    ] = "20k",
    field: Annotated[str, typer.Option(help="The field or column that holds the text.")] = "text",
    concepts: Annotated[
        bool, typer.Option("--concepts/--no-concepts", help="Also score against the 60 concepts of the bench.")
    ] = True,
    every: Annotated[bool, typer.Option("--all", help="List every concept, not the ten lowest.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw L0 against loss recovered to this file.")] = None,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md has its shape).")] = False,
) -> None:
    """How good SAEs are, beside each other: what they rebuild, how sparsely, what the model loses, which concepts they
    have features for."""
    from lancet.cli.harvest import count

    how = {"tokens": count(tokens), "loss_tokens": count(loss_tokens), "column": field, "concepts": concepts}
    given = tuple(saes or choice.named().saes)
    if len(set(given)) < len(given):
        raise UsageError("an SAE is named twice; name each once")
    if text is not None:  # mistakes are told before a model is opened
        from lancet.atlas.corpus import sources

        sources(text)
    model, opened = replace(choice, saes=given).open_each()
    from lancet.evaluation.evaluate import evaluate

    with show.working("scoring"):
        found = evaluate(model, _named(opened, given), text, say=show.say, **how)
    if plot is not None:
        show.say(f"drew {found.plot(plot)}")
    if json:
        show.as_json(found.to_json())
        return
    told(found, every)
    for note in (*found.notes, *model.notes):
        show.say(note)


def _named(opened: list[Sae], given: tuple[str, ...]) -> dict[str, Sae]:
    """The SAEs by their names, or by what was given where two share one."""
    names = [sae.name for sae in opened]
    if len(set(names)) < len(names):
        names = list(given)
    return dict(zip(names, opened, strict=True))


def told(found: Evaluation, every: bool) -> None:
    """A row for each SAE; where concepts were measured another table with a row for each, and its lowest concepts."""
    figures = [_figures(each, each in found.front) for each in found.saes]
    columns = list(figures[0])
    title = f"{found.tokens:,} tokens of {found.text}"
    show.line(title)
    show.table(columns, [list(row.values()) for row in figures], right=columns[1:])
    benches = [(each, each.bench) for each in found.saes if each.bench]
    if not benches:
        return
    train, heldout = benches[0][1].lines
    show.line(
        f"{len(benches[0][1].concepts)} concepts: chosen on {train:,} training lines, scored on {heldout:,} others"
    )
    rows = [_bench(each.name, bench) for each, bench in benches]
    show.table(list(rows[0]), [list(row.values()) for row in rows], right=list(rows[0])[1:])
    for each, bench in benches:
        if len(benches) > 1:
            show.heading(each.name)
        _concepts(bench, every)


def _figures(each: Scores, best: bool) -> dict[str, str]:
    losses, decoder = each.losses, each.decoder
    return {
        "SAE": each.name,
        "features": f"{each.d_sae:,}",
        "explained": f"{each.explained_variance:.3f}",
        "L0": f"{each.l0:.1f}",
        "cosine": f"{each.cosine:.3f}",
        "dead": f"{each.dead:.1%}",
        "loss": f"{losses.plain:.3f}" if losses else "",
        "spliced": f"{losses.spliced:.3f}" if losses else "",
        "zeros": f"{losses.zeros:.3f}" if losses else "",
        "recovered": "" if each.recovered is None else f"{each.recovered:.3f}{' *' * best}",
        "KL": f"{losses.kl:.3f}" if losses else "",
        "twins": f"{decoder.median:.2f} / {decoder.near:.1%} / {decoder.twin:.1%}",
    }


def _bench(name: str, bench: Bench) -> dict[str, str]:
    f = bench.figures()
    absorbed = f["absorbed"]
    return {
        "SAE": name,
        "AUROC": f"{f['auroc']:.3f}",
        "F1": f"{f['f1']:.2f}",
        ">= 0.9": str(f["auroc_at_least_0.9"]),
        "best there": f"{f['auroc_best']:.3f}",
        "probe": f"{f['auroc_probe']:.3f}",
        "probe F1": f"{f['f1_probe']:.2f}",
        "coordinate": f"{f['auroc_coordinate']:.3f}",
        "detectors": f"{f['detectors']:.1f}",
        "split": f"{f['split']:.2f}",
        "sharing": str(f["sharing"]),
        "absorbed": "" if absorbed is None else f"{absorbed:.1%}",
    }


def _concepts(bench: Bench, every: bool) -> None:
    ordered = sorted(bench.concepts, key=lambda concept: concept.feature.auroc)
    shown = ordered if every else ordered[:LOWEST]

    def both(of: Detector) -> str:
        return f"{of.auroc:.3f} / {of.f1:.2f}"

    rows: list[list[Any]] = [
        [
            c.name,
            f"#{c.feature.index}",
            both(c.feature),
            f"#{c.best[0]} {c.best[1]:.3f}",
            both(c.probe),
            both(c.coordinate),
            c.detectors,
            " ".join(f"#{feature}" for feature in c.split),
            f"{c.sparse_f1:.2f}",
            "" if c.absorbed is None else f"{c.absorbed:.0%}",
        ]
        for c in shown
    ]
    head = [
        "concept",
        "feature",
        "AUROC / F1",
        "best there",
        "probe",
        "coordinate",
        "detectors",
        "split",
        "F1",
        "absorbed",
    ]
    show.table(head, rows, right=head[2:])
    for feature, names in bench.shared.items():
        show.line(f"#{feature} is the feature of {', '.join(names)}")
    if len(shown) < len(ordered):
        show.say(f"the {len(shown)} lowest of {len(ordered)} concepts; --all lists them all")
