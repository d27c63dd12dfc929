"""`lancet train`: its options are the fields of `TrainConfig`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lancet.cli import show
from lancet.cli.opening import Choice
from lancet.cli.options import OPTIONS
from lancet.training.config import TrainConfig, helps, option

if TYPE_CHECKING:
    from lancet.training.progress import Row

OPENING = ("model", "device", "dtype")


def run(
    corpus: Annotated[
        list[str],
        typer.Argument(help="Files (.txt, .md, .jsonl, .parquet; .gz, .zst), folders, a data set's name, or -."),
    ],
    out: Annotated[Path, typer.Option(help="The SAE's folder; of several, the folder that holds theirs.")],
    config: Annotated[
        Path | None, typer.Option(help="A TOML file whose keys are the options (sites and seeds in the plural).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md has its shape).")] = False,
    **options: Any,
) -> None:
    """Train SAEs on a model's activations. Several sites, widths, k and seeds make an SAE of each combination, all of
    which learn from one pass of the model. Killed or stopped, the same command goes on."""
    choice = Choice(**{name: options.pop(name) for name in OPENING})
    given = {name: value for name, value in options.items() if value not in (None, [])}
    how = TrainConfig.of(given) if config is None else TrainConfig.load(config, **given)
    how.saes()  # mistakes are told before a model is opened
    from lancet.atlas.corpus import sources
    from lancet.training.finish import RECORD
    from lancet.training.progress import check_log

    sources(corpus)
    check_log(how.log)
    named = choice.named()
    assert named.model is not None
    from lancet.files import read_json
    from lancet.loading import open_model
    from lancet.training.train import train

    with show.working(f"opening {named.model}"):
        model = open_model(named.model, named.device, named.dtype, show.say)
    folders = train(model, corpus, how, out, Board() if sys.stderr.isatty() else show.say)
    if json:
        show.as_json([{"folder": str(folder)} | read_json(folder / RECORD) for folder in folders])
        return
    for folder in folders:
        show.line(f"wrote {folder}")


def _signature() -> inspect.Signature:
    """`run`'s own parameters, those that open a model, and one for each field of `TrainConfig`."""
    own = inspect.signature(run, eval_str=True)
    first = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, keyword, default=getattr(Choice(), name), annotation=OPTIONS[name]) for name in OPENING
    ]
    told = helps()
    for each in fields(TrainConfig):
        kind = list[str] | None if isinstance(each.default, tuple) else str | None
        help_ = typer.Option(option(each.name), help=told[each.name], metavar="TEXT")
        more.append(inspect.Parameter(each.name, keyword, default=None, annotation=Annotated[kind, help_]))
    as_keywords = [each.replace(kind=keyword) for each in first]
    return own.replace(parameters=[*as_keywords[:2], *more, *as_keywords[2:]])


SIGNATURE = _signature()
run.__signature__ = SIGNATURE  # type: ignore[attr-defined]
run.__annotations__ = {each.name: each.annotation for each in SIGNATURE.parameters.values()} | {"return": None}


class Board:
    """A `say` with a live table, for a terminal."""

    def __init__(self) -> None:
        self.live: Any = None
        self.rows: list[Row] = []
        self.doing = ""

    def __call__(self, line: str) -> None:
        show.say(line)

    def step(self, text: str, done: int, of: int) -> None:
        """So many of so many are done: under the table where there is one."""
        if self.live is None:
            show.say.step(text, done, of)
        else:
            self.doing = "" if done >= of else f"{text} {show.bar(done, of)} {done:,} of {of:,}"
            self.live.update(self._drawn())

    def board(self, rows: list[Row]) -> None:
        """Shows rows; without any the table stays as it is, and is no longer live."""
        if rows:
            self.rows = rows
            if self.live is None:
                from rich.live import Live

                self.live = Live(console=show.notes(), auto_refresh=False)
                self.live.start()
            self.live.update(self._drawn(), refresh=True)
        elif self.live is not None:
            self.live.stop()
            self.live = None

    def _drawn(self) -> Any:
        from rich import box
        from rich.table import Table

        from lancet.training.progress import HEAD

        table = Table(box=box.SIMPLE_HEAD if show.can_show("─") else box.ASCII, caption=self.doing or None)
        for i, column in enumerate(HEAD):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*map(show.harmless, row.cells()))
        return table
