"""A harvest by several processes, here or on a cluster, through Ray.

Each worker opens its own model and SAEs and counts groups of shards; this process alone adds up what comes and writes
checkpoints. A group counts when it has come whole: what a worker that died had done is done again by another, and
nothing is counted twice. What is counted depends on the shards alone, so that the atlas is the same byte for byte as
one process writes with the same number of torch threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lancet.atlas.activations import active
from lancet.atlas.shards import Shard
from lancet.atlas.statistics import Statistics
from lancet.errors import LancetError, MissingError, UsageError
from lancet.telling import Say

if TYPE_CHECKING:
    from lancet.atlas.harvest import Sum
    from lancet.atlas.plan import Plan
    from lancet.atlas.shards import Prepared
    from lancet.lab import Lab
    from lancet.sae import Sae

GROUP = 8  # shards that a worker counts before it hands over
ATTEMPTS = 3  # workers that may die of one group
WORKERS = 2

# One shard of a group: its index, the number of its first piece, its file's bytes, the SAEs that lack it.
Job = tuple[int, int, bytes, list[int]]


def check() -> None:
    """Raises MissingError where Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingError('the engine "ray" needs Ray: pip install "lancet-sae[ray]"')


class Worker:
    """A process of its own with its own model and SAEs.

    Args:
        opening: the arguments of `lab.open_lab`, or a model and its SAEs.
        sites: of the SAEs that are wanted, in order.
        octaves: of their histograms.
        threads: of torch.
    """

    def __init__(self, opening: Any, sites: Sequence[str], octaves: Sequence[int], threads: int) -> None:
        import torch

        from lancet.lab import open_lab
        from lancet.site import Site

        torch.set_num_threads(threads)
        if isinstance(opening, dict):
            lab = open_lab(**opening)
            self.model, saes = lab.model, lab.saes
        else:
            self.model, saes = opening
        by_site = {sae.site: sae for sae in saes}
        self.saes: list[Sae] = [by_site[Site.parse(site)] for site in sites]
        self.octaves = octaves

    def count(self, jobs: Sequence[Job]) -> list[tuple[list[int], dict[str, Any]]]:
        """The shards that were added up for each SAE, and their statistics as arrays."""
        sums = [Statistics(sae.d_sae, octave) for sae, octave in zip(self.saes, self.octaves, strict=True)]
        done: list[list[int]] = [[] for _ in self.saes]
        for index, first, raw, want in jobs:
            found = active(self.model, [self.saes[i] for i in want], Shard.load(raw, first))
            for i, part in zip(want, found, strict=True):
                sums[i].add(part)
                done[i].append(index)
        return [(each, part.arrays() if each else {}) for each, part in zip(done, sums, strict=True)]


def parts(
    lab: Lab,
    saes: Sequence[Sae],
    plan: Plan,
    prepared: Prepared,
    sums: Sequence[Sum],
    workers: int,
    address: str | None,
    say: Say,
) -> Iterator[None]:
    """Adds all shards to the sums; yields after each group.

    Args:
        workers: how many processes; WORKERS where 0.
        address: of a running cluster; a local one is started where None.

    Raises:
        UsageError: there is no cluster at the address.
        LancetError: workers die again and again.
    """
    import ray
    import torch
    from ray.exceptions import RayActorError, RayTaskError

    workers = workers or WORKERS
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    groups = _groups(prepared, sums, workers)
    if not groups:
        return
    started = not ray.is_initialized()
    if started:
        _start(address, workers)
    try:
        opening = ray.put(getattr(lab, "opened", None) or (lab.model, list(saes)))
        threads = torch.get_num_threads()
        kind = ray.remote(
            num_cpus=threads if address else 1, num_gpus=int(lab.model.device.type == "cuda"), max_restarts=0
        )(Worker)
        sites, octaves = [told["site"] for told in plan.saes], [told["octave"] for told in plan.saes]

        def new() -> Any:
            return kind.remote(opening, sites, octaves, threads)  # type: ignore[attr-defined]

        idle = [new() for _ in range(min(workers, len(groups)))]
        busy: dict[Any, tuple[Any, list[tuple[int, list[int]]]]] = {}
        died: Counter[int] = Counter()
        while groups or busy:
            while groups and idle:
                actor, group = idle.pop(), groups.pop(0)
                jobs = [(i, prepared.first[i], prepared.path(i).read_bytes(), want) for i, want in group]
                busy[actor.count.remote(jobs)] = actor, group
            (ready, *_), _ = ray.wait(list(busy), num_returns=1)
            actor, group = busy.pop(ready)
            try:
                found = ray.get(ready)
            except RayActorError as error:
                died[group[0][0]] += 1
                if died[group[0][0]] >= ATTEMPTS:
                    raise LancetError(
                        f"{ATTEMPTS} workers died one after the other ({str(error).splitlines()[0]}); try fewer "
                        f"--workers (each holds its own model), then the same command goes on from here"
                    ) from error
                say("a worker died; another does its shards again")
                groups.insert(0, group)
                idle.append(new())
                continue
            except RayTaskError as error:
                if isinstance(error.cause, LancetError):
                    raise error.cause from error
                raise
            for each, (done, arrays) in zip(sums, found, strict=True):
                if done:
                    each.take(done, Statistics.of(arrays, each.statistics.d_sae, each.statistics.octave))
            idle.append(actor)
            yield
    finally:
        if started:
            ray.shutdown()


def _groups(prepared: Prepared, sums: Sequence[Sum], workers: int) -> list[list[tuple[int, list[int]]]]:
    """Shards that some SAE lacks, with those SAEs, in groups small enough that all workers are busy to the end."""
    left = []
    for index in range(len(prepared.shards)):
        want = [i for i, each in enumerate(sums) if index not in each.done]
        if want:
            left.append((index, want))
    size = max(1, min(GROUP, len(left) // (4 * workers)))
    return [left[first : first + size] for first in range(0, len(left), size)]


def _start(address: str | None, workers: int) -> None:
    import logging

    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"no Ray cluster at {address}: {told}; start one with `ray start --head`") from error
