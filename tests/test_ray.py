"""The same harvest by two workers of Ray, one of which dies: the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path

import psutil
import pytest
from test_harvest import LENGTH, SHARD, lab_of, raw, texts, written

from lancet.atlas import ray_engine, shards
from lancet.atlas.harvest import harvest
from lancet.errors import MissingError
from lancet.model import Model

pytest.importorskip("ray")


class Say:
    """Kills one worker after the first group that comes in."""

    def __init__(self) -> None:
        self.killed, self.said = False, []

    def __call__(self, line: str) -> None:
        self.said.append(line)

    def step(self, text: str, done: int, of: int) -> None:
        if self.killed or not text.startswith("harvesting:"):
            return
        for process in psutil.Process().children(recursive=True):
            if "ray::Worker" in " ".join(process.cmdline()):
                self.killed = True
                process.kill()
                return


def test_two_workers_of_which_one_dies(
    tiny_gpt2: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", SHARD)
    model, corpus = tiny_gpt2(), written(tmp_path / "c.jsonl", texts(100))  # groups are left when one dies
    monkeypatch.setattr(ray_engine, "GROUP", 1)
    harvest(lab_of(model), corpus, tmp_path / "one", length=LENGTH, lenses=False)
    told = Say()
    how = {"engine": "ray", "workers": 2, "lenses": False, "say": told}
    harvest(lab_of(model), corpus, tmp_path / "two", length=LENGTH, **how)
    assert raw(tmp_path / "two") == raw(tmp_path / "one")
    assert told.killed and any("a worker died" in line for line in told.said)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r'pip install "lancet-sae\[ray\]"'):
        ray_engine.check()
