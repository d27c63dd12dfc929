"""The command line. `lancet --help` imports neither torch nor anything that does: each command imports what it uses."""

from __future__ import annotations

import gc
import io
import sys


def main() -> None:
    """Entry point: runs the command, turns errors into one line and an exit code (2 bad usage, 1 failure)."""
    # A command makes many lasting objects (most of them while torch and transformers are imported) and ends soon:
    # looking for garbage among them at the usual pace took 0.8 s of a 5.3 s `lancet read`, once more at the end 0.3 s.
    gc.set_threshold(100_000, 50, 1000)

    from lancet.cli.app import app
    from lancet.errors import LancetError, UsageError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows "?", it does not crash
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except LancetError as error:
        code = 2 if isinstance(error, UsageError) else 1
        print(f"lancet: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("lancet: interrupted", file=sys.stderr)
    except BrokenPipeError:  # `lancet read ... | head`
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _usage_code(error)
    gc.disable()
    sys.exit(code if isinstance(code, int) else 0)


def _usage_code(error: Exception) -> int:
    """Typer's own usage errors print themselves; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    code = getattr(error, "exit_code", None)
    if code is None:
        raise error
    if show is not None:
        show()
    return int(code)
