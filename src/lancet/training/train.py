"""`train`: a corpus through a model, and what is seen at its sites into SAEs.

The corpus becomes one file of token ids (text.py), is read in blocks (blocks.py), and every SAE makes its steps on the
batches of its site (trainer.py). A checkpoint is the state of all SAEs and a place in the text (checkpoint.py): since
blocks depend on their number alone, a training that was killed and resumed ends with the same weights bit for bit, on
the same machine with as many threads.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint, names
from lancet.atlas import plan as plans
from lancet.atlas.corpus import Bad, sources
from lancet.errors import DivergedError, UsageError
from lancet.files import read_json
from lancet.training import checkpoint, text
from lancet.training.blocks import Blocks
from lancet.training.config import IDLE, places
from lancet.training.finish import VERSION, is_finished, write
from lancet.training.plan import check_disk, steps_of
from lancet.training.plan import plan as plan_memory
from lancet.training.progress import Progress, check_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lancet.lab import Lab
    from lancet.model import Model
    from lancet.site import Site
    from lancet.telling import Say
    from lancet.training.blocks import Feed
    from lancet.training.checkpoint import Place
    from lancet.training.config import TrainConfig
    from lancet.training.text import Text
    from lancet.training.trainer import Learner

MEASURED = 16_384  # tokens that thresholds and final figures are measured on


def train(
    model: Model | Lab | str,
    corpus: str | Path | Sequence[str | Path],
    config: TrainConfig,
    out: str | Path,
    say: Say | None = None,
) -> list[Path]:
    """Trains SAEs on a model's activations with sae-lens' training classes and its `SAETrainer`.

    Interrupted, it goes on where it was when it is called again with the same arguments. Ctrl-C writes what there is as
    usable SAEs, and then raises KeyboardInterrupt.

    Args:
        model: opened, or its name.
        corpus: files, folders of them, "-" for standard input, or names of data sets; see `atlas.corpus.sources`.
        config: how.
        out: the SAE's folder; with several it holds one folder for each.
        say: told how far it is (`lancet.telling`); one with an attribute `board` is given rows of a table.

    Returns:
        the folder of each SAE (by site, width, k, seed) in sae-lens' layout, with `training.json` and `training.csv`.

    Raises:
        UsageError: the corpus is empty, too small or cannot be read, the model has no such site, what is asked does not
            fit into memory, another training is at work there, or a finished SAE is there.
        MismatchError: an unfinished training is there that was begun with something else.
        MissingError: what is to be logged to is not installed.
        LancetError: the loss is no number any more, or the disk is full; checkpoints written before stay.
    """
    say = say or (lambda line: None)
    specs, place = config.saes(), Path(out).expanduser()
    check_log(config.log)
    found = sources(corpus)  # type: ignore[arg-type] - one or several
    opened = _opened(model, say)
    for spec in specs:
        opened.check_site(spec.site)
    folders = places(place, config)
    plans.refuse_finished(folders, place / plans.WORK, "SAE", is_finished)
    with plans.alone(place, what="training") as work:
        plans.refuse_finished(folders, work, "SAE", is_finished)
        run = _begun(opened, config, found, folders, work, say)
        with _interrupts(say) as is_stopped:
            run.train(is_stopped)
        shutil.rmtree(work)
    with suppress(OSError):
        (place / plans.WORK).with_suffix(".lock").unlink()
    return folders


def _opened(model: Any, say: Say) -> Model:
    if isinstance(model, str):
        from lancet.loading import open_model

        return open_model(model, say=say)
    from lancet import friends
    from lancet.lab import Lab

    return model.model if isinstance(model, Lab) else friends.model_of(model)


def _begun(model: Model, config: TrainConfig, found: Any, folders: list[Path], work: Path, say: Say) -> _Run:
    """A training: plan written or compared, text prepared, SAEs as a checkpoint or chance left them."""
    for left in list(work.rglob(".*")):  # of processes that were killed while they wrote
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    kept = read_json(work / plans.PLAN) if (work / plans.PLAN).is_file() else {}
    length = plans.piece_length(model, config.length)
    if kept.get("batch") and kept.get("block"):
        batch, block = config.batch or int(kept["batch"]), int(kept["block"])
    else:
        memory = plan_memory(model, config)
        batch, block = memory.batch, memory.block
        say(str(memory))
    now = {name: value for name, value in config.to_json().items() if name not in IDLE}
    now |= {"length": length, "batch": batch, "block": block, "lancet_training": VERSION}
    now |= {"corpus": [source.identity() for source in found]}
    now |= {"model": {"name": model.name, "fingerprint": fingerprint.of_model(model)}}
    plans.begin(now, work, "training")
    try:
        prepared = _prepared(model, config, found, work, length, batch, say)
        steps = steps_of(config, prepared.tokens, batch)
    except UsageError:
        if not kept:  # another attempt may have other settings
            (work / plans.PLAN).unlink()
            shutil.rmtree(work / "text", ignore_errors=True)
        raise
    rounds = steps * batch / prepared.tokens
    if rounds > 1.5:
        say(f"the corpus has {prepared.tokens:,} tokens: each is trained on about {rounds:.1f} times")
    sites = list(dict.fromkeys(spec.site for spec in config.saes()))
    blocks = Blocks(model, sites, prepared, block, work / "blocks" if config.buffer == "disk" else None)
    if blocks.folder is not None:
        check_disk(sum(map(model.d_site, sites)), prepared.tokens, blocks.folder, work)
    from lancet.training.trainer import Learner

    learners = [
        Learner.new(spec, config, model.d_site(spec.site), batch, steps, model.device) for spec in config.saes()
    ]
    run = _Run(model, config, prepared, blocks, batch, learners, folders, work, say)
    if (newest := checkpoint.latest(work)) is not None:
        run.place = checkpoint.load(newest, learners, str(model.device))
        say(f"going on after step {checkpoint.step_of(newest):,} of {steps:,}")
    return run


def _prepared(model: Model, config: TrainConfig, found: Any, work: Path, length: int, batch: int, say: Say) -> Text:
    step: Callable[[str, int, int], None] = getattr(say, "step", lambda text, done, of: None)
    most = None if config.tokens is None else config.tokens + config.tokens // 1000 + batch
    plans.check_free(work, most)
    bad = Bad()
    try:
        return text.prepare(
            model,
            found,
            config.field,
            work / "text",
            length,
            most,
            bad,
            lambda done: step("preparing the corpus, tokens", done, max(most or 0, done + 1)),
        )
    finally:
        step("preparing the corpus", 1, 1)
        if bad.total:
            say(str(bad))


class _Stop(Exception):  # noqa: N818 - no error
    """Ends the reading of a block."""


@contextmanager
def _interrupts(say: Say) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a mark, so that no step is left half done; a second one interrupts at once."""
    asked: list[bool] = []

    def note(_number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(eq=False)
class _Run:
    """A training at work.

    Attributes:
        learners: the SAEs, in the order of `folders`.
        place: where in the text it is.
        sample: site -> some rows of the last block that was read whole.
    """

    model: Model
    config: TrainConfig
    text: Text
    blocks: Blocks
    batch: int
    learners: list[Learner]
    folders: list[Path]
    work: Path
    say: Say
    place: Place = field(default_factory=checkpoint.Place)
    sample: dict[Site, Tensor] = field(default_factory=dict)

    def train(self, is_stopped: Callable[[], bool]) -> None:
        """All steps that are left, and the SAEs' files."""
        self.progress = Progress(self.learners, self.folders, self.config.log, self.say)
        self.begin = self.saved = time.monotonic()
        self.before = self.place.seconds
        try:
            is_done = self._steps(is_stopped)
        except DivergedError as error:
            self.progress.end(show=False)
            raise DivergedError(f"{error}; {self._after_divergence()}") from error
        except BaseException:
            self.progress.end(show=False)
            raise
        if is_done:
            self.progress.end()
            self._finish(finished=True)
            return
        self.progress.end()
        if not self.sample:
            self.say("stopped before the first step of this run; the same command goes on")
            raise KeyboardInterrupt
        self._save()
        self._finish(finished=False)
        self.say(
            f"stopped after step {self.learners[0].step_number:,} of {self.learners[0].steps:,}; what "
            f"{' and '.join(map(str, self.folders))} holds can be used; the same command goes on"
        )
        raise KeyboardInterrupt

    def _steps(self, is_stopped: Callable[[], bool]) -> bool:
        """Trains until all is done, or until it is stopped: then False."""
        while True:
            try:
                feeds = self._feeds(is_stopped)
            except _Stop:
                return False
            if self.place.block == 0 and not self.place.given:
                self._set_scales(feeds)
            ended = self._block(feeds, is_stopped)
            if ended is not None:
                return ended
            del feeds  # before the next block takes the same room

    def _block(self, feeds: dict[Site, Feed], is_stopped: Callable[[], bool]) -> bool | None:
        """Trains on a block: True where that was all, False where it is stopped, None where the next block is due."""
        for index in range(max(map(len, feeds.values()))):
            self._round(feeds, index)
            if all(learner.is_done for learner in self.learners):
                return True
            if is_stopped():
                return False
            if time.monotonic() - self.saved >= self.config.checkpoint:
                self._save()
        self.place.rest = {site: feed.left() for site, feed in feeds.items()}
        for site, feed in feeds.items():
            self.place.massive[site] = self.place.massive.get(site, 0) + feed.massive
        self.place.given = {}
        self.place.block += 1
        return None

    def _feeds(self, is_stopped: Callable[[], bool]) -> dict[Site, Feed]:
        step: Callable[[str, int, int], None] = getattr(self.say, "step", lambda text, done, of: None)

        def told(done: int, of: int) -> None:
            step("reading, tokens", done, of)
            if is_stopped():
                step("reading, tokens", of, of)
                raise _Stop

        feeds = self.blocks.feeds(self.place.block, self.place.rest, self.batch, told)
        self.sample = {site: feed.values[feed.order[:MEASURED]] for site, feed in feeds.items()}
        return feeds

    def _set_scales(self, feeds: dict[Site, Feed]) -> None:
        for site, feed in feeds.items():
            mean, norm = feed.mean_and_norm()
            if norm == 0:
                raise UsageError(f"all activations at {site} are 0; choose another --site")
            for learner in self.learners:
                if learner.spec.site == site:
                    learner.begin(mean, norm, feed[0] if len(feed) else feed.left().float())

    def _round(self, feeds: dict[Site, Feed], index: int) -> None:
        """The batches with a number in the block, of each site, unless they were trained on before."""
        for site, feed in feeds.items():
            own = [i for i, learner in enumerate(self.learners) if learner.spec.site == site]
            if not self.place.given.get(site, 0) <= index < len(feed) or self.learners[own[0]].is_done:
                continue
            batch = feed[index]
            for i in own:
                self.learners[i].step(batch, self.progress.wants(i))
                self.progress.after_step(i)
            self.place.given[site] = index + 1

    def _save(self) -> None:
        self.place.seconds = self.before + time.monotonic() - self.begin
        checkpoint.save(self.work, self.learners, self.place)
        self.saved = time.monotonic()

    def _after_divergence(self) -> str:
        newest = checkpoint.latest(self.work)
        good = "no checkpoint was made before"
        if newest is not None:
            good = f"the last good checkpoint is {newest}, after step {checkpoint.step_of(newest):,}"
        return f"{good}; begin again in another --out with a smaller --lr (it was {self.config.lr:g})"

    def _finish(self, finished: bool) -> None:
        self.place.seconds = self.before + time.monotonic() - self.begin
        facts = {
            "model_name": names.hub_id(self.model.name) or self.model.name,
            "prepend_bos": self.model.start_plain is not None,
            "context_size": plans.piece_length(self.model, self.config.length),
            "model_from_pretrained_kwargs": asdict(self.model.processed),
        }
        told = {
            "finished": finished,
            "model": {"name": self.model.name, "fingerprint": fingerprint.of_model(self.model)},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "config": self.config.to_json(),
            "corpus": self.text.about,
            "batch": self.batch,
            "block": self.blocks.size,
            "seconds": round(self.place.seconds, 1),
        }
        for learner, folder in zip(self.learners, self.folders, strict=True):
            site = learner.spec.site
            rows = self.sample[site].float().split(self.batch)
            own = told | {"massive": self.place.massive.get(site, 0)}
            saved = write(learner, rows, facts, own, folder, self.work / "finished")
            self.say(
                f"{folder}: {learner.trainer.n_training_samples:,} tokens; as it is saved, L0 {saved['l0']:.1f} and "
                f"{saved['explained']:.1%} of the variance explained, over {saved['tokens']:,} of them"
            )
