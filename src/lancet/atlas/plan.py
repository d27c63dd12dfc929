"""What a harvest was begun with, kept in its work folder: a resumed harvest must be the same one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint, namefile
from lancet.atlas import shards
from lancet.atlas.manifest import NAME
from lancet.atlas.place import slug
from lancet.errors import LancetError, MismatchError, UsageError
from lancet.files import read_json, write_json

if TYPE_CHECKING:
    from lancet.atlas.corpus import Source
    from lancet.lab import Lab
    from lancet.model import Model
    from lancet.sae import Sae

VERSION = 1
WORK, PLAN = ".work", "plan.json"
LENGTH = 512
ROOM = 4  # the histogram's scale is so many times the largest maximum known
SAID = {
    "model": "another model",
    "saes": "other SAEs",
    "corpus": "another corpus",
    "sae": "another SAE",
    "shard_tokens": "another version of Lancet",
    "lancet_harvest": "another version of Lancet",
    "lancet_encode": "another version of Lancet",
    "lancet_training": "another version of Lancet",
    "sites": "another --site",
    "seeds": "another --seed",
}
LONG = ("model", "saes", "corpus", "sae")  # parts of a plan that are too long to be quoted


@dataclass(frozen=True)
class Plan:
    """The settings that decide what a harvest counts.

    Attributes:
        model: {"name", "fingerprint"}.
        saes: of each {"name", "site", "d_sae", "key", "fingerprint", "octave"}.
        corpus: identities of its sources, see `corpus.Source.identity`.
        field, length, tokens, shard_tokens: see `harvest`.
    """

    model: dict[str, Any]
    saes: list[dict[str, Any]]
    corpus: list[list[Any]]
    field: str
    length: int
    tokens: int | None
    shard_tokens: int

    def to_json(self) -> dict[str, Any]:
        """With the version of the format."""
        return {"lancet_harvest": VERSION} | asdict(self)


def make(
    lab: Lab, saes: Sequence[Sae], found: Sequence[Source], field: str, length: int | None, tokens: int | None
) -> Plan:
    """The plan of a harvest; the SAEs' facts are measured where they are not known.

    Raises:
        UsageError: a length or a number of tokens that cannot be.
    """
    length = piece_length(lab.model, length)
    check_tokens(tokens)
    told = [
        {
            "name": sae.name,
            "site": str(sae.site),
            "d_sae": sae.d_sae,
            "key": namefile.key(sae),
            "fingerprint": fingerprint.of_pair(lab.model, sae),
            "octave": octave(float(lab.facts(sae, harvested=False).maximum.abs().max())),
        }
        for sae in saes
    ]
    corpus = [source.identity() for source in found]
    model = {"name": lab.model.name, "fingerprint": fingerprint.of_model(lab.model)}
    return Plan(model, told, corpus, field, length, tokens, shards.SHARD)


def piece_length(model: Model, length: int | None) -> int:
    """How many tokens a piece may have, its start token counted: LENGTH, or the context where that is less, for None.

    Raises:
        UsageError: a length that the model cannot read.
    """
    most = min(model.context, shards.LONGEST)
    length = min(LENGTH, most) if length is None else length
    if not 2 <= length <= most:
        raise UsageError(f"a piece must have 2 to {most} tokens with {model.name}, got --length {length}")
    return length


def check_tokens(tokens: int | None) -> None:
    """Raises UsageError where a corpus is to end after fewer than one token."""
    if tokens is not None and tokens < 1:
        raise UsageError(f"the number of tokens must be at least 1, got {tokens}")


def octave(maximum: float) -> int:
    """The logarithm to base 2 of the histogram's scale: the power of two that is at least ROOM times the maximum."""
    return math.ceil(math.log2(ROOM * maximum)) if maximum > 0 else 0


def begin(now: dict[str, Any], work: Path, what: str = "harvest") -> None:
    """Writes a plan into a new work folder; one that is there must be the same.

    Args:
        now: the plan as JSON holds it.
        what: it is a plan of.

    Raises:
        MismatchError: what was begun in the folder was begun with something else.
    """
    path = work / PLAN
    if not path.is_file():
        write_json(path, now)
        return
    kept = read_json(path)
    other = [name for name in now if kept.get(name) != now[name] and not (name == "model" and same_model(kept, now))]
    if other:
        words = list(dict.fromkeys(SAID.get(name, f"another --{name.replace('_', '-')}") for name in other))
        raise MismatchError(
            f"{work} holds an unfinished {what} that was begun with {' and '.join(words)}"
            f"{_settings(other, kept, now)}; go on with the same, delete {work}, or choose another --out"
        )


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two plans are of the same weights, under whatever name."""
    return a.get("model", {}).get("fingerprint") == b.get("model", {}).get("fingerprint")


def _settings(other: Sequence[str], kept: dict[str, Any], now: dict[str, Any]) -> str:
    def told(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    plain = [name for name in other if name not in LONG]
    return f" ({', '.join(f'{name} {told(kept.get(name))}, now {told(now[name])}' for name in plain)})" if plain else ""


def places(out: Path, saes: Sequence[Sae]) -> list[Path]:
    """The folder of each SAE's atlas: `out` for one, folders by site in it for several."""
    return [out] if len(saes) == 1 else [out / slug(str(sae.site)) for sae in saes]


@contextmanager
def alone(out: Path, work: Path | None = None, what: str = "harvest") -> Iterator[Path]:
    """The work folder of an atlas (or whatever else is written to `out`), for this process alone.

    Args:
        work: the folder; WORK in `out` where None.
        what: is written.

    Raises:
        UsageError: another process is writing there, or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    work = work or out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work.with_suffix(".lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another {what} is writing to {out}; wait for it, or choose another --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    try:
        yield work
    finally:
        lock.release()


def refuse_finished(
    folders: Sequence[Path],
    work: Path,
    what: str = "atlas",
    is_finished: Callable[[Path], bool] = lambda folder: (folder / NAME).is_file(),
) -> None:
    """Raises UsageError where a finished atlas is there; of several, those that this very harvest has written may be.

    Args:
        work: the work folder; with a plan in it a harvest of these folders is unfinished.
        what: the folders are to hold.
        is_finished: whether one does.
    """
    there = [folder for folder in folders if is_finished(folder)]
    if there and (len(there) == len(folders) or not (work / PLAN).is_file()):
        raise UsageError(
            f"{' and '.join(map(str, there))} holds a finished {what}; choose another --out, or delete it first"
        )


def check_free(work: Path, tokens: int | None) -> None:
    """Raises LancetError where the disk has not even room for the shards of so many tokens."""
    free, needs = shutil.disk_usage(work).free, 12 * (tokens or 0)
    if free < needs:
        raise LancetError(
            f"not enough disk space in {work}: about {needs / 1e6:.0f} MB needed for the shards, {free / 1e6:.0f} MB "
            f"free; free some space or choose another --out"
        )
