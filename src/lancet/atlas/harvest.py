"""`harvest`: a corpus through a model and its SAEs, to an atlas of each SAE.

The corpus becomes shards once (shards.py); each shard's statistics (statistics.py) are added up shard by shard, and the
sum is written beside the list of shards that are in it every minute or so. Whatever is added later adds up to the same,
so that a harvest which was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet.atlas import finish, shards
from lancet.atlas import plan as plans
from lancet.atlas.activations import active
from lancet.atlas.corpus import Bad, documents, sources
from lancet.atlas.place import default, slug
from lancet.atlas.selection import STRONGEST
from lancet.atlas.statistics import Statistics
from lancet.errors import DamagedError, UsageError
from lancet.telling import Say, minutes

if TYPE_CHECKING:
    from lancet.atlas.plan import Plan
    from lancet.atlas.shards import Prepared
    from lancet.lab import Lab
    from lancet.sae import Sae
    from lancet.site import Site

EVERY = 60.0  # seconds between two checkpoints
SHARE = 50  # of the time of a checkpoint, that must pass before the next
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Harvested:
    """What came of a harvest.

    Attributes:
        folders: an atlas each, in the order of the SAEs.
        corpus: as in `manifest.json`.
        bad: what could not be read of the corpus, in words, "" where all could or an earlier run read it.
        seconds: this run took.
    """

    folders: list[Path]
    corpus: dict[str, Any]
    bad: str
    seconds: float


@dataclass
class Sum:
    """What was counted so far of one SAE.

    Attributes:
        statistics: of the shards that are done.
        done: their indices.
        path: of the checkpoint.
        is_whole: not amid adding a shard, where an interruption would leave half of it.
    """

    statistics: Statistics
    path: Path
    done: set[int] = field(default_factory=set)
    is_whole: bool = True

    @classmethod
    def at(cls, path: Path, d_sae: int, octave: int) -> Sum:
        """The checkpoint at a path, else nothing counted yet; a damaged one is counted anew."""
        if path.is_file():
            try:
                found, told = Statistics.load(path)
                return cls(found, path, set(told["done"]))
            except DamagedError:
                path.unlink()
        return cls(Statistics(d_sae, octave), path)

    def save(self) -> None:
        """Writes the checkpoint."""
        if self.is_whole:
            self.statistics.save(self.path, done=sorted(self.done))

    @contextmanager
    def adding(self) -> Iterator[Statistics]:
        """The statistics, to which something is added inside the block."""
        self.is_whole = False
        yield self.statistics
        self.is_whole = True

    def take(self, done: Iterable[int], part: Statistics) -> None:
        """Adds the statistics of more shards."""
        with self.adding() as statistics:
            statistics.merge(part)
            self.done |= set(done)


def harvest(
    lab: Lab,
    corpus: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    tokens: int | None = None,
    length: int | None = None,
    saes: Sequence[str | Site] = (),
    column: str = "text",
    lenses: bool = True,
    examples: int = STRONGEST,
    engine: str = "local",
    workers: int = 0,
    address: str | None = None,
    say: Say | None = None,
) -> Harvested:
    """Counts what a corpus says about every feature, and writes it as an atlas (docs/atlas.md).

    Interrupted, it goes on where it was when it is called again with the same arguments.

    Args:
        corpus: files, folders of them, "-" for standard input, or names of data sets; see `corpus.sources`.
        out: the atlas's folder; with several SAEs it holds one folder for each site. The SAE's own place where None.
        tokens: read no more than so many.
        length: tokens of a piece at most, its start token counted; 512, or the model's context where that is less.
        saes: sites of the lab's SAEs that are wanted; all where none is named.
        column: the field that holds the text in JSONL and Parquet.
        lenses: also measure what each feature makes the model say.
        examples: so many of the strongest of each feature are kept, and a quarter as many of each fifth of its range;
            they are most of an atlas' size.
        engine: "local", or "ray" for `workers` processes, here or on the cluster at `address`.
        say: told how far it is (`telling.counted`); the lab's where None.

    Raises:
        UsageError: the corpus is empty or cannot be read, another harvest is at work there, or an atlas is there.
        MismatchError: an unfinished harvest is there that was begun with something else.
        LancetError: the disk is full; what was written before stays, and a later call goes on from there.
    """
    begin = time.monotonic()
    say = say or lab.say
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}; there are {' and '.join(ENGINES)}")
    if not 1 <= examples <= STRONGEST:
        raise UsageError(f"1 to {STRONGEST} examples can be kept, got {examples}")
    if engine == "ray":
        from lancet.atlas import ray_engine

        ray_engine.check()
    chosen = [lab.sae(site) for site in saes] if saes else list(lab.saes)
    if not chosen:
        lab.sae()  # says what to do
    found = sources(corpus)  # type: ignore[arg-type] - one or several
    place = Path(out).expanduser() if out is not None else default(lab.sae().name)
    folders = plans.places(place, chosen)
    plans.refuse_finished(folders, place / plans.WORK)
    with plans.alone(place) as work:
        plans.refuse_finished(folders, work)  # by a harvest that ended meanwhile
        plan = plans.make(lab, chosen, found, column, length, tokens)
        plans.begin(plan.to_json(), work)
        bad = Bad()
        prepared = shards.finished(work / "shards") or _prepare(lab, plan, found, work, bad, say)
        sums = _sums(plan, work)
        if engine == "ray":
            from lancet.atlas import ray_engine

            parts = ray_engine.parts(lab, chosen, plan, prepared, sums, workers, address, say)
        else:
            parts = _locally(lab, chosen, prepared, sums)
        _count(prepared, sums, parts, say)
        for sae, told, counted, folder in zip(chosen, plan.saes, sums, folders, strict=True):
            finish.write(lab, sae, plan, told, prepared, counted.statistics, folder, work, lenses, examples, say)
            lab.harvested(sae)
        shutil.rmtree(work)
    with suppress(OSError):
        (place / plans.WORK).with_suffix(".lock").unlink()
    return Harvested(folders, prepared.to_json(), str(bad), time.monotonic() - begin)


def _prepare(lab: Lab, plan: Plan, found: Any, work: Path, bad: Bad, say: Say) -> Prepared:
    plans.check_free(work, plan.tokens)
    step: Callable[[str, int, int], None] = getattr(say, "step", lambda text, done, of: None)

    def told(done: int) -> None:
        step(
            "preparing the corpus" if plan.tokens else f"preparing the corpus: {done:,} tokens",
            done,
            plan.tokens or done + 1,
        )

    try:
        texts = documents(found, plan.field, bad)
        prepared = shards.prepare(
            lab.model, texts, work / "shards", plan.length, plan.tokens, plan.shard_tokens, bad, told
        )
    finally:
        step("preparing the corpus", 1, 1)
    if bad.total:
        say(str(bad))
    if prepared.repeats:
        say(f"{prepared.repeats:,} of {prepared.documents + prepared.repeats:,} documents were repeats and left out")
    return prepared


def _sums(plan: Plan, work: Path) -> list[Sum]:
    return [Sum.at(work / f"{slug(told['site'])}.safetensors", told["d_sae"], told["octave"]) for told in plan.saes]


def _count(prepared: Prepared, sums: list[Sum], parts: Iterator[None], say: Say) -> None:
    """Adds up all shards, with checkpoints; what is counted when it is interrupted is kept."""
    watch = _Watch(prepared, sums, say)
    try:
        for _ in parts:
            watch.step()
            watch.save()
    except KeyboardInterrupt:
        watch.save(now=True)
        raise
    finally:
        watch.end()
    watch.save(now=True)


def _locally(lab: Lab, saes: Sequence[Sae], prepared: Prepared, sums: list[Sum]) -> Iterator[None]:
    for index in range(len(prepared.shards)):
        want = [(sae, each) for sae, each in zip(saes, sums, strict=True) if index not in each.done]
        if not want:
            continue
        found = active(lab.model, [sae for sae, _ in want], prepared.load(index))
        for (_, each), part in zip(want, found, strict=True):
            with each.adding() as statistics:
                statistics.add(part)
                each.done.add(index)
        yield


class _Watch:
    """Checkpoints in time, and what is told meanwhile."""

    def __init__(self, prepared: Prepared, sums: list[Sum], say: Say) -> None:
        self.prepared, self.sums = prepared, sums
        self.told: Callable[[str, int, int], None] = getattr(say, "step", lambda text, done, of: None)
        self.begin = self.saved = time.monotonic()
        self.took = 0.0
        self.counted = [len(each.done) for each in sums]
        self.before = self._done()

    def _done(self) -> int:
        done = set.intersection(*(each.done for each in self.sums))
        return sum(self.prepared.shards[index][0] for index in done)

    def step(self) -> None:
        """Tells how far it is."""
        done, of = self._done(), self.prepared.tokens
        rate = max(done - self.before, 1) / max(time.monotonic() - self.begin, 1e-9)
        seen = " + ".join(f"{int((each.statistics.fired > 0).sum()):,}" for each in self.sums)
        left = (of - done) / rate
        text = f"harvesting: {rate:,.0f} tokens/s, {minutes(left)} left, {seen} features seen, tokens"
        self.told(text, min(done, of - 1), of)

    def save(self, now: bool = False) -> None:
        """Writes checkpoints when it is time."""
        if not now and time.monotonic() - self.saved < max(EVERY, SHARE * self.took):
            return
        if [len(each.done) for each in self.sums] == self.counted:
            return
        begin = time.monotonic()
        for each in self.sums:
            each.save()
        self.saved = time.monotonic()
        self.took = self.saved - begin
        self.counted = [len(each.done) for each in self.sums]

    def end(self) -> None:
        """Nothing more is shown."""
        self.told("harvesting", self.prepared.tokens, self.prepared.tokens)
