"""What the user has chosen to open where nothing is named: one small file in the user's data folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lancet import embedded
from lancet.errors import DamagedError
from lancet.files import data_dir, read_json, write_json


@dataclass(frozen=True)
class Pair:
    """A model's name and the names of its SAEs; none for the model's own default."""

    model: str = embedded.NAME
    saes: tuple[str, ...] = ()


def file() -> Path:
    """Where the choice is kept."""
    return data_dir() / "default.json"


def default() -> Pair:
    """The pair chosen with `lancet use`, smollm2 where none was.

    Raises:
        DamagedError: the file was changed by hand into something else.
    """
    if not file().is_file():
        return Pair()
    told = read_json(file())
    try:
        return Pair(str(told["model"]), tuple(str(name) for name in told["saes"]))
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{file()} does not name a model and its SAEs; delete it, or `lancet use NAME`") from error


def use(model: str, saes: Sequence[str] = ()) -> Pair:
    """Makes a pair the default and returns it; paths are kept absolute, so that it holds in every folder."""
    pair = Pair(_lasting(model), tuple(_lasting(name) for name in saes))
    write_json(file(), asdict(pair))
    return pair


def _lasting(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name
