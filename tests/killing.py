"""Processes that are killed: forked from one that has imported what takes long once for all tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

IMPORTED = ["torch", "transformers.models.gpt2.modeling_gpt2", "interp_engine.arch", "scipy.sparse", "pyarrow.parquet"]


def exit_code(target: Callable[..., None], *args: Any) -> int | None:
    """Of a process of its own that calls a function of a module; -9 where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


class KillsAtStep:
    """A `say` that kills its own process at the n-th step whose text begins so."""

    def __init__(self, begins: str, left: int) -> None:
        self.begins, self.left = begins, left

    def __call__(self, line: str) -> None:
        pass

    def step(self, text: str, done: int, of: int) -> None:
        self.left -= text.startswith(self.begins)
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
