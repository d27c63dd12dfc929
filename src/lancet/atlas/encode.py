"""`encode`: the active features of a corpus as one Parquet file, a row for each token or for each document.

Chunks of the corpus (rows.py) become parts in a work folder beside the output, which are joined at the end. A part's
name holds a hash of what was read: when the same command is given again after a kill, the corpus is tokenised again,
and only the chunks that have no part yet go through the model, so that the joined file is the same byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancet import fingerprint
from lancet.atlas import plan as plans
from lancet.atlas import rows
from lancet.atlas.corpus import Bad, documents, sources
from lancet.errors import DamagedError, MismatchError, UsageError
from lancet.files import whole_file
from lancet.telling import Say

if TYPE_CHECKING:
    from lancet.lab import Lab
    from lancet.site import Site

VERSION = 1
ROWS, BYTES = 65_536, 32 << 20  # of a row group, about


@dataclass(frozen=True)
class Written:
    """What came of encoding a corpus.

    Attributes:
        file: the Parquet file.
        rows: in it; documents, tokens: read (start tokens left out).
        bad: what could not be read of the corpus, in words, "" where all could.
        bad_lines: how many lines that were.
        seconds: this run took.
    """

    file: Path
    rows: int
    documents: int
    tokens: int
    bad: str
    bad_lines: int
    seconds: float


def encode(
    lab: Lab,
    corpus: str | Path | Sequence[str | Path],
    out: str | Path,
    pool: str | None = None,
    tokens: int | None = None,
    length: int | None = None,
    sae: str | Site | None = None,
    column: str = "text",
    say: Say | None = None,
) -> Written:
    """Writes the active features of a corpus to a Parquet file (docs/encode.md), whole or not at all.

    Interrupted, it goes on where it was when it is called again with the same arguments. Meanwhile the disk holds the
    features twice for a moment.

    Args:
        corpus: files, folders of them, "-" for standard input, or names of data sets; see `corpus.sources`.
        pool: "max" (by size), "mean" or "count" over each document's tokens; None for a row of each token.
        tokens: read no more than so many.
        length: tokens of a piece at most, its start token counted; 512, or the context where that is less, for None.
        sae: the site of the SAE; the default one where none is named.
        column: the field that holds the text in JSONL and Parquet.
        say: told how far it is; the lab's where None.

    Raises:
        UsageError: the corpus is empty or cannot be read, another process is at work there, or the file is there.
        MismatchError: unfinished work is there that was begun with something else.
        DamagedError: a part that an earlier run wrote cannot be read.
        LancetError: the disk is full, or activations are not finite; what was written before stays.
    """
    begin = time.monotonic()
    say = say or lab.say
    rows.check_pool(pool)
    plans.check_tokens(tokens)
    chosen = lab.sae(sae)
    length = plans.piece_length(lab.model, length)
    found = sources(corpus)  # type: ignore[arg-type] - one or several
    file = Path(out).expanduser()
    _refuse_there(file)
    told = {
        "lancet_encode": VERSION,
        "model": {"name": lab.model.name, "fingerprint": fingerprint.of_model(lab.model)},
        "sae": {"name": chosen.name, "site": str(chosen.site), "fingerprint": fingerprint.of_pair(lab.model, chosen)},
        "corpus": [source.identity() for source in found],
        "field": column,
        "length": length,
        "tokens": tokens,
        "pool": pool,
    }
    beside = file.parent / f".{file.name}.work"
    bad = Bad()
    with plans.alone(file, beside, "encode") as work:
        _refuse_there(file)  # written by another process meanwhile
        plans.begin(told, work, "encode")
        parts, counted, documents_ = [], 0, 0
        step: Callable[[str, int, int], None] = getattr(say, "step", lambda text, done, of: None)
        kept = {int(path.name[:6]): path for path in work.glob("[0-9]*-*.parquet")}
        try:
            texts = documents(found, column, bad)
            for number, chunk in enumerate(rows.chunks(lab.model, texts, length, tokens)):
                path = work / f"{number:06}-{chunk.digest}.parquet"
                if kept.get(number, path) != path:
                    raise MismatchError(
                        f"{work} holds unfinished work on another corpus; go on with the same, delete {work}, or "
                        f"choose another --out"
                    )
                if number not in kept:
                    _write(path, [rows.table(lab.model, chosen, chunk, pool)])
                parts.append(path)
                counted += int(chunk.lengths.sum())
                documents_ = int(chunk.document[-1]) + 1
                step(f"encoding: {documents_:,} documents, tokens", counted, max(tokens or 0, counted + 1))
        finally:
            step("encoding", 1, 1)
        if bad.total:
            say(str(bad))
        if not parts:
            shutil.rmtree(work)
            why = f"; {bad}".replace("\n", "; ") if bad.total else ""
            raise UsageError(f"the corpus is empty: it holds no text{why}; give other files or another --field")
        joined = work / "joined.parquet"
        about = {name: told[name] for name in ("lancet_encode", "model", "sae", "length", "pool")}
        about["sae"] = about["sae"] | {"d_sae": chosen.d_sae}
        written = _write(joined, rows.final(map(_read, parts), pool), about)
        with whole_file(file) as temporary:  # explains a folder that cannot be written to
            os.replace(joined, temporary)
        shutil.rmtree(work)
    with suppress(OSError):
        beside.with_suffix(".lock").unlink()
    return Written(file, written, documents_, counted, str(bad), bad.total, time.monotonic() - begin)


def _refuse_there(file: Path) -> None:
    if file.exists():
        raise UsageError(f"{file} is there already; choose another --out, or delete it first")


def _write(path: Path, tables: Iterable[Any], about: dict[str, Any] | None = None) -> int:
    """Tables as one file, in row groups; returns how many rows it has."""
    import pyarrow.parquet as parquet

    count, writer = 0, None
    metadata = {b"lancet": json.dumps(about, ensure_ascii=False).encode()} if about else None
    with whole_file(path) as temporary, temporary.open("wb") as file:
        for table in _grouped(tables):
            table = table.replace_schema_metadata(metadata)
            if writer is None:
                writer = parquet.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(1, len(table)))
            count += len(table)
        if writer is not None:
            writer.close()
    return count


def _grouped(tables: Iterable[Any]) -> Iterator[Any]:
    """Tables put together to the size of a row group."""
    import pyarrow as pa

    held: list[Any] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= ROWS or sum(each.nbytes for each in held) >= BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _read(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedError(
            f"{path} is damaged; delete it, and the same command writes it again ({str(error).splitlines()[0]})"
        ) from error
