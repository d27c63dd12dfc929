"""Files that are either whole or absent.

Everything Lancet writes goes to a temporary name beside its destination and is renamed when complete, so that a full
disk, a kill or Ctrl-C never leaves something half-written that a later run takes for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lancet.errors import DamagedError, LancetError, UsageError

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def cache_dir() -> Path:
    """Lancet's own cache: `LANCET_CACHE`, else the platform's user cache folder."""
    if chosen := os.environ.get("LANCET_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lancet", appauthor=False))


def data_dir() -> Path:
    """What the user made and would miss (names, the default pair): `LANCET_DATA`, else the platform's folder."""
    if chosen := os.environ.get("LANCET_DATA"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("lancet", appauthor=False))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error.

    Raises:
        UsageError: the folder cannot be written to.
        LancetError: the disk is full; nothing is left behind.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with explained(path):
            yield temporary
            _ordinary_mode(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, needs_bytes: int = 0) -> Iterator[Path]:
    """Like `whole_file` for a folder; an existing `path` is replaced.

    Args:
        path: the folder to make.
        needs_bytes: what it will hold, checked against the free space before anything is written.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needs_bytes:
            raise LancetError(
                f"not enough disk space for {path}: {needs_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
                f"free some space or set LANCET_CACHE to a folder on another disk"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with explained(path):
            yield temporary
            for made in (temporary, *temporary.rglob("*")):
                _ordinary_mode(made)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ordinary_mode(path: Path) -> None:
    """The mode of any other file: temporary names and safetensors' own files are readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Tells in one line why `path` cannot be written.

    Raises:
        UsageError: its folder cannot be written to; LancetError: the disk is full.
    """
    import errno

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if isinstance(error, SafetensorError) and (said := re.search(r"os error (\d+)", str(error))):
            code = int(said[1])  # safetensors writes in Rust and tells the number only in its message
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise LancetError(
                f"the disk is full: {path} was not written and nothing half-written was left; "
                f"free some space or choose another folder"
            ) from error
        denied = (errno.EACCES, errno.EROFS, errno.EPERM)
        if code in (*denied, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST):
            raise UsageError(
                f"cannot write {path}: {os.strerror(code)}; choose a path in a folder that you may write to"
            ) from error
        raise


@contextmanager
def changed_by_one(path: Path) -> Iterator[None]:
    """No other process changes the file inside the block; one that does is waited for, 10 seconds.

    Raises:
        LancetError: another process goes on changing it; UsageError: its folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=10)
        lock.acquire()
    except Timeout as error:
        raise LancetError(f"another process has been changing {path} for 10 seconds; try again") from error
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; set LANCET_DATA to a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Writes UTF-8 JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file as they are, empty ones left out.

    Raises:
        UsageError: it cannot be read, or holds no text.
    """
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {why}; give a file of UTF-8 text, one text a line") from error
    if not lines:
        raise UsageError(f"{path} is empty; give one text a line")
    return lines


def read_json(path: Path) -> Any:
    """Reads UTF-8 JSON.

    Raises:
        DamagedError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedError(f"{path} is not valid JSON ({error}); restore it or fetch it again") from error


def kept_json(path: Path, make: Callable[[], Any]) -> Any:
    """What `path` holds, made and written there when it is missing or damaged.

    A cache that cannot be written costs the same work again, and nothing else.
    """
    if path.is_file():
        try:
            return read_json(path)
        except DamagedError:
            path.unlink()
    found = make()
    with suppress(LancetError):
        write_json(path, found)
    return found


def check_safetensors(path: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file and checks that the file is as long as the header says.

    Returns:
        name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        UsageError: there is no such file.
        DamagedError: a pickle (never opened), or a truncated or corrupt file.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise DamagedError(f"{path} is a pickle, which can run code and is never opened; get the .safetensors file")
    if not path.is_file():
        raise UsageError(f"no file {path}; give the path of a .safetensors file or of a folder that holds one")
    size = path.stat().st_size
    with path.open("rb") as file:
        start, brace = file.read(8), file.read(1)
        # The brace that opens the header tells the two apart: a header of 640 bytes also starts with 80 02.
        if brace != b"{" and start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            raise DamagedError(f"{path} is a pickle under another name and was not opened; get the real .safetensors")
        file.seek(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DamagedError(f"{path} is truncated or not safetensors ({size} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DamagedError(f"{path} has a corrupt header; fetch it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise DamagedError(f"{path} is damaged: {size} bytes, its header promises {8 + length + end}; fetch it again")
    return header
