"""The command line run in this process: no model is opened, so nothing else is needed."""

from __future__ import annotations

import io
import sys
from unittest import mock

import pytest

from lancet.cli import main, show


def lancet(*words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in a pipe."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with mock.patch.multiple(sys, argv=["lancet", *words], stdout=out, stderr=err):
        show.console.cache_clear()
        show.notes.cache_clear()
        with pytest.raises(SystemExit) as caught:
            main()
        for stream in (out, err):
            stream.flush()
    show.console.cache_clear()
    show.notes.cache_clear()
    told = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return int(caught.value.code or 0), told[0], told[1]
