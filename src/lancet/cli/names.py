"""`lancet names`: descriptions of an atlas' features, taken in, proposed, asked for, listed and written out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lancet.cli import show
from lancet.errors import MissingError, UsageError

if TYPE_CHECKING:
    from lancet.atlas.atlas import Atlas
    from lancet.atlas.explanations import Explanation
    from lancet.atlas.importing import Target
    from lancet.atlas.survey import Survey

names = typer.Typer(
    no_args_is_help=True, help="What features stand for, in words: take in, propose, ask a model, list, export."
)

Folder = Annotated[Path | None, typer.Option("--atlas", help="The atlas' folder; left out, that of the SAE.")]
Model = Annotated[str | None, typer.Option(help="Whose atlas, where --atlas is left out: a model's name.")]
SaeName = Annotated[str | None, typer.Option("--sae", help="Whose atlas, where --atlas is left out: an SAE's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md has its shape).")]


@names.command(name="import")
def import_(
    files: Annotated[
        list[str], typer.Argument(help="Files, folders of files, or patterns such as 'batch-*.jsonl.gz'.")
    ],
    anyway: Annotated[bool, typer.Option("--anyway", help="Also records that name another model or layer.")] = False,
    atlas: Folder = None,
    model: Model = None,
    sae: SaeName = None,
    json: Json = False,
) -> None:
    """Take in published explanations: Neuronpedia's exports (JSON lines, also .gz), a CSV of feature and name, or what
    `lancet names export` wrote."""
    from lancet.atlas import explanations, importing

    held = opened(atlas, model, sae)
    with show.working("reading"):
        found = importing.read(files, target(held), anyway)
        explanations.keep(held.manifest.key, found.entries)
    features = len({entry.feature for entry in found.entries})
    if json:
        show.as_json(
            {
                "sae": held.manifest.sae,
                "files": found.files,
                "taken": len(found.entries),
                "features": features,
                "others": dict(found.others),
                "corrupt": found.corrupt,
                "first_corrupt": found.first,
                "empty": found.empty,
            }
        )
        return
    show.line(
        f"took in {len(found.entries):,} explanations of {features:,} of the {len(held):,} features of "
        f"{held.manifest.sae}"
    )
    for whose, count in found.others.most_common(5):
        show.say(f"refused {count:,} of {whose}, which is another model or layer")
    if len(found.others) > 5:
        show.say(f"and those of {len(found.others) - 5} other models or layers")
    if found.corrupt:
        show.say(f"{found.corrupt:,} lines could not be read ({found.first})")
    if found.empty:
        show.say(f"{found.empty:,} records have no text")


@names.command()
def auto(atlas: Folder = None, model: Model = None, sae: SaeName = None, json: Json = False) -> None:
    """Propose a name for every feature out of the atlas alone: what it fires on, what it is about, what it says."""
    from lancet.atlas import explanations, proposals

    held = opened(atlas, model, sae)
    with show.working("looking at examples"):
        found = proposals.propose(held)
        explanations.forget(held.manifest.key, explanations.AUTO)
        explanations.keep(held.manifest.key, found)
    if json:
        show.as_json([entry.to_json() for entry in found])
        return
    silent = len(held) - len(found)
    show.line(
        f"proposed {len(found):,} names for the features of {held.manifest.sae}"
        + (f"; {silent:,} never fired and have none" if silent else "")
    )
    listing(found[:: max(1, len(found) // 12)][:12])
    show.say("`lancet names list` shows all, `lancet names list FEATURE` what one was made from")


@names.command()
def ask(
    endpoint: Annotated[str, typer.Option(help="The server, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The model that is asked, as the server calls it.")],
    features: Annotated[str | None, typer.Option(help="Which features, such as 1,2,5-9.")] = None,
    top: Annotated[int | None, typer.Option(help="The so many that fire most often, dense ones left out.")] = None,
    score: Annotated[
        str | None, typer.Option(help="Ask for no names, score those of this source: auto, or as listed.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Tokens, prompts and answers together, after which this run stops.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Questions on their way at once.")] = 4,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
    answer_tokens: Annotated[int, typer.Option(min=16, help="Tokens an answer may have, thinking included.")] = 512,
    language: Annotated[str, typer.Option(help="Of the names.")] = "English",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of silence before a question is repeated.")] = 120.0,
    again: Annotated[bool, typer.Option("--again", help="Also ask what was answered before.")] = False,
    atlas: Folder = None,
    sae: SaeName = None,
    json: Json = False,
) -> None:
    """Ask a language model at a server for names, and score each by whether it tells where the feature fires. This is
    the one command that sends text (of the atlas) anywhere: to the server that is named, and to no other."""
    from lancet.cli.names_ask import run

    run(
        opened(atlas, None, sae),
        (endpoint, model, api_key_env, timeout),
        (features, top, score),
        budget,
        concurrency,
        answer_tokens,
        language,
        again,
        json,
    )


@names.command(name="list")
def list_(
    feature: Annotated[
        str | None, typer.Argument(help="One feature, 123 or a name: all its names, and what they were made from.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Only those that have these characters.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Only those of this source: auto, ask, import, or in full.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many lines; 0 for all.")] = 50,
    atlas: Folder = None,
    model: Model = None,
    sae: SaeName = None,
    json: Json = False,
) -> None:
    """List what features are called: the best name of each, or every name of one."""
    from lancet.atlas import explanations, which

    held = opened(atlas, model, sae)
    key = held.manifest.key
    if feature is not None:
        found = explanations.of(key, [index := which.feature(held, feature)]).get(index, [])
        if not found and not json:
            raise UsageError(f"#{index} has no explanation; `lancet names auto` proposes one")
    elif not (kept := explanations.load(key)) and not json:
        raise MissingError(
            f"no explanations of {held.manifest.sae} yet; `lancet names auto` proposes some, `lancet names import` "
            f"takes published ones"
        )
    else:
        picked = {i: [e for e in some if fits(e, search, source)] for i, some in sorted(kept.items())}
        found = [best for some in picked.values() if (best := explanations.best(some))]
    if json:
        show.as_json([entry.to_json() for entry in found])
        return
    shown = found if feature is not None or not limit else found[:limit]
    listing(shown, notes=feature is not None)
    if len(shown) < len(found):
        show.say(f"{len(shown):,} of {len(found):,}; --limit 0 shows all, --search WORDS some")


@names.command()
def export(
    file: Annotated[Path, typer.Argument(help="The file to write, JSON lines.")],
    atlas: Folder = None,
    model: Model = None,
    sae: SaeName = None,
    json: Json = False,
) -> None:
    """Write all explanations to a file that `lancet names import` reads."""
    from lancet.atlas import explanations

    held = opened(atlas, model, sae)
    count = explanations.export(held.manifest.key, file)
    if json:
        show.as_json({"file": str(file), "explanations": count})
    else:
        show.line(f"wrote {count:,} explanations of {held.manifest.sae} to {file}")


def opened(folder: Path | None, model: str | None, sae: str | None) -> Atlas:
    """The atlas in a folder, or the pair's; no model is opened.

    Raises:
        MissingError: there is none; DamagedError: it cannot be read.
    """
    from lancet.atlas import which
    from lancet.cli.opening import Choice

    pair = Choice(model, (sae,) if sae else ()).named()
    return which.find(pair.model or "", pair.saes, folder)


def target(held: Atlas) -> Target:
    """Whose explanations an atlas' are."""
    from lancet import catalogue
    from lancet.atlas.importing import Target
    from lancet.site import Site

    told = held.manifest
    release = catalogue.load().release_of(told.sae)
    entry = None
    if release is not None:
        entry = next((e for e in catalogue.load().releases[release] if e.name == told.sae), None)
    return Target(told.key, len(held), told.model, told.sae, Site.parse(told.site).layer, entry and entry.neuronpedia)


def numbers(text: str, count: int) -> list[int]:
    """The features of `1,2,5-9`, each once.

    Raises:
        UsageError: it cannot be read, or names one that there is not.
    """
    out: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"#?(\d+)(?:-#?(\d+))?", part)
        if not found:
            raise UsageError(f"--features must be numbers such as 1,2,5-9, got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise UsageError(f"--features {part}: there are #0 to #{count - 1}, the smaller number first")
        out += range(first, last + 1)
    return list(dict.fromkeys(out))


def fits(entry: Explanation, search: str | None, source: str | None) -> bool:
    """Whether an explanation is among those looked for."""
    kind = entry.source.split(":")[0]
    return (search is None or search.casefold() in entry.text.casefold()) and source in (None, kind, entry.source)


def told(score: float | None, asked: int) -> str:
    """A detection score in words."""
    return "" if score is None else f"{score:.2f} of {asked}"


def listing(found: Sequence[Explanation], notes: bool = False) -> None:
    """Explanations as a table."""
    scored = any(entry.score is not None for entry in found)
    noted = notes and any(entry.note for entry in found)
    columns = ["feature", "name", *(["detection"] * scored), "source", *(["made from"] * noted)]
    rows: list[list[Any]] = []
    for entry in found:
        row = [f"#{entry.feature}", entry.text]
        row += [told(entry.score, entry.asked)] * scored + [entry.source] + [entry.note] * noted
        rows.append(row)
    show.table(columns, rows)
    if scored:
        show.say(
            "detection: balanced accuracy of telling where a feature fires by its name, of so many windows; "
            "chance is 0.50"
        )


def shown(found: Survey) -> list[dict[str, Any]]:
    """The results of a run, as JSON."""
    from lancet.atlas.survey import to_json

    return [to_json(named) for named in found.named]
