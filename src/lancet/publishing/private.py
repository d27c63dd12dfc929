"""What must not leave the machine: paths on its disk, which often hold a user's name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lancet.errors import LancetError

# A path inside a sentence: not after a word, a dot, a colon or a slash, so that owner/name and addresses stay.
_INSIDE = re.compile(r"(?<![\w.:/\\-])(?:file:/{1,2})?(?:~[\w.-]*|[A-Za-z]:|\\)?(?:[\\/][^\s\\/,;:'\"()<>|]+)+[\\/]?")


def without_paths(value: Any) -> Any:
    """JSON with every absolute path in its strings, keys among them, cut to its last part."""
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, dict):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(each) for each in value]
    return value


def _cut(text: str) -> str:
    bare = re.sub(r"^file:/{2}(?=/)", "", text)
    if PurePosixPath(bare).is_absolute() or bare.startswith("~"):
        return PurePosixPath(bare.replace("\\", "/")).name
    if PureWindowsPath(bare).is_absolute():
        return PureWindowsPath(bare).name
    return _INSIDE.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], text)


def refuse_paths(files: Iterable[Path], sources: Iterable[Path]) -> None:
    """The last look at what is about to leave: no text names the home folder or a folder that an SAE came from.

    Args:
        files: texts; sources: folders.

    Raises:
        LancetError: one does; says which.
    """
    own = {str(Path.home()), *(str(folder.resolve()) for folder in sources)}
    own |= {folder.replace("\\", "\\\\") for folder in own}  # as JSON has them
    for file in files:
        text = file.read_text(encoding="utf-8")
        if found := next((folder for folder in own if len(folder) > 1 and folder in text), None):
            raise LancetError(
                f"{file.parent.name}/{file.name} would tell where things lie on this machine ({found}); nothing was "
                f"sent: take the path out of the file that it came from"
            )
