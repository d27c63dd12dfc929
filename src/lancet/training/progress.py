"""What is told while SAEs are trained: rows of a table to who can show one, lines to who cannot, a CSV always, and
TensorBoard or Weights & Biases where they are asked for."""

from __future__ import annotations

import csv
import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.errors import MissingError
from lancet.files import explained, whole_file
from lancet.telling import minutes

if TYPE_CHECKING:
    from lancet.telling import Say
    from lancet.training.trainer import Learner

ROW = 100  # steps between two rows of the CSV
LINE = 15.0  # seconds between two lines
SHOWN = 1.0  # seconds between two tables
CSV = "training.csv"
COLUMNS: tuple[str, ...] = ("step", "tokens", "loss", "l0", "explained", "dead", "lr", "coefficient")


@dataclass(frozen=True)
class Row:
    """How far one SAE is.

    Attributes:
        name: of its folder.
        step, steps: made, and in all.
        tokens: trained on.
        rate: tokens a second in this run, of this SAE.
        left: seconds, about.
        figures: loss, l0, explained, dead (a share) of its last step or of one shortly before.
    """

    name: str
    step: int
    steps: int
    tokens: int
    rate: float
    left: float
    figures: dict[str, float]

    def cells(self) -> list[str]:
        """As a table shows it, in the order of `HEAD`."""
        f = self.figures
        shown = [f"{f[name]:{form}}" if name in f else "" for name, form in FORMS.items()]
        return [
            self.name,
            f"{self.step:,} of {self.steps:,}",
            f"{self.tokens:,}",
            f"{self.rate:,.0f}",
            minutes(self.left),
            *shown,
        ]

    def __str__(self) -> str:
        named = zip(HEAD[1:], self.cells()[1:], strict=True)
        return f"{self.name}: " + ", ".join(f"{head} {cell}" for head, cell in named if cell)


FORMS = {"loss": ".4g", "l0": ".1f", "explained": ".4f", "dead": ".2%"}
HEAD = ("SAE", "step", "tokens", "tokens/s", "left", "loss", "L0", "explained", "dead")


class Progress:
    """Rows of all SAEs of a training.

    Args:
        folders: of the SAEs.
        log: "", "tensorboard" or "wandb".
        say: has an attribute `board` where it can show a table: called with a list of `Row`, with none at the end.

    Raises:
        MissingError: what is to be logged to is not installed.
    """

    def __init__(self, learners: Sequence[Learner], folders: Sequence[Path], log: str, say: Say) -> None:
        self.learners, self.folders, self.say = learners, folders, say
        self.board: Callable[[list[Row]], None] | None = getattr(say, "board", None)
        self.begin = time.monotonic()
        self.before = [learner.trainer.n_training_samples for learner in learners]
        self.every = LINE if self.board is None else SHOWN
        self.shown = self.begin
        self.steps = [-1 for _ in learners]  # that were made when all were last shown
        self.writers = [logger(log, folder) for folder in folders]
        for learner, folder in zip(learners, folders, strict=True):
            _begin_csv(folder / CSV, learner.step_number)

    def wants(self, index: int) -> bool:
        """Whether figures of an SAE's next step are wanted: it makes a row, or is about to be shown."""
        learner = self.learners[index]
        made = learner.step_number + 1
        return made % ROW == 0 or made == learner.steps or time.monotonic() - self.shown > self.every

    def after_step(self, index: int) -> None:
        """An SAE has made a step."""
        learner = self.learners[index]
        if learner.step_number % ROW == 0 or learner.is_done:
            row = {"step": learner.step_number, "tokens": learner.trainer.n_training_samples} | learner.figures
            path = self.folders[index] / CSV
            with explained(path), path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            self.writers[index].write(row)
        is_last = index == len(self.learners) - 1 or learner.is_done
        if is_last and time.monotonic() - self.shown > self.every:
            self.show()

    def show(self) -> None:
        """Shows where all are."""
        self.shown = time.monotonic()
        self.steps = [learner.step_number for learner in self.learners]
        rows = self.rows()
        if self.board is not None:
            self.board(rows)
        else:
            for row in rows:
                self.say(str(row))

    def rows(self) -> list[Row]:
        """Where all are."""
        passed = max(time.monotonic() - self.begin, 1e-9)
        out = []
        for learner, folder, before in zip(self.learners, self.folders, self.before, strict=True):
            tokens = learner.trainer.n_training_samples
            rate = (tokens - before) / passed
            missing = (learner.steps - learner.step_number) * learner.trainer.cfg.train_batch_size_samples
            left = missing / rate if rate else 0.0
            out.append(Row(folder.name, learner.step_number, learner.steps, tokens, rate, left, learner.figures))
        return out

    def end(self, show: bool = True) -> None:
        """Nothing more is shown or logged."""
        if show and self.steps != [learner.step_number for learner in self.learners]:
            self.show()
        if self.board is not None:
            self.board([])
        for writer in self.writers:
            writer.close()


def _begin_csv(path: Path, step: int) -> None:
    """A CSV that ends with the row of a step: what a run that was killed wrote after its checkpoint goes."""
    kept = []
    if path.is_file():
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            if (row.get("step") or "").isdigit() and int(row["step"]) <= step:
                kept.append({name: row.get(name) for name in COLUMNS})
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


class _Nothing:
    def write(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: Path) -> None:
        import wandb

        self.run = wandb.init(project="lancet", name=folder.name, dir=str(folder), reinit="create_new")

    def write(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def logger(log: str, folder: Path) -> Any:
    """What takes the rows of an SAE beside its CSV.

    Raises:
        MissingError: it is not installed.
    """
    check_log(log)
    if not log:
        return _Nothing()
    folder.mkdir(parents=True, exist_ok=True)
    return _TensorBoard(folder) if log == "tensorboard" else _WandB(folder)


def check_log(log: str) -> None:
    """Raises MissingError where what is to be logged to is not installed."""
    if log and importlib.util.find_spec(log) is None:
        raise MissingError(f"--log {log} needs the package {log}; install it with `pip install {log}`, or leave it out")
