"""Rows of files: JSON lines, a JSON list, or Parquet, each with the place it comes from.

Every reader raises JaxdynError, naming the file and the line or row, for what cannot be read.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdyn.storage.paths import one_line, require_name
from jaxdyn.storage.reading import available_memory, parse_json, require_room
from jaxdyn.types import JaxdynError

LINE_BYTES = 64 * 2**20
"""The longest line that is read."""

Row = dict[str, Any]
Rows = Iterator[tuple[Row, str]]
"""Objects by their fields, and where each is: the file, and its line or row from 1."""


def rows_of(path: str | Path) -> Rows:
    """A file's rows by the end of its name: .parquet, .json (one list), else lines; .gz or not."""
    suffix = Path(str(path).removesuffix(".gz")).suffix
    return {".parquet": parquet_rows, ".json": listed_rows}.get(suffix, line_rows)(path)


def line_rows(path: str | Path) -> Rows:
    """A JSON object a line; blank lines are skipped."""
    empty = True
    try:
        with _open(path) as file:
            lines = iter(lambda: file.readline(LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if len(line) > LINE_BYTES:
                    raise JaxdynError(f"{where} has more than {LINE_BYTES} bytes")
                if line.strip():
                    yield _object(parse_json(line, where), where), where
                    empty = False
    except (OSError, EOFError, zlib.error) as error:  # a gzip that is cut short is EOF
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if empty:
        raise JaxdynError(f"{path} is empty: wanted one JSON object a line")


def listed_rows(path: str | Path) -> Rows:
    """The objects of one JSON list."""
    most = available_memory() // 16  # objects take about ten times their text
    try:
        with _open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if len(content) > most:
        raise JaxdynError(f"{path} has more than {most} bytes, all that fit into memory as objects")
    rows = parse_json(content, str(path))
    if not isinstance(rows, list) or not rows:
        raise JaxdynError(f"{path} should hold a list of JSON objects, got {rows!r:.60}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield _object(row, where), where


def parquet_rows(path: str | Path, names: tuple[str, ...] | None = None) -> Rows:
    """A Parquet file's rows, or those of its columns that are named."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(require_name(str(path))) as file:
            groups = range(file.metadata.num_row_groups)
            sizes = [file.metadata.row_group(group).total_byte_size for group in groups]
            require_room(path, max(sizes, default=0))
            columns = None
            if names is not None:
                columns = [name for name in names if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for start in range(len(batch)):
                    number += 1
                    row = batch.slice(start, 1).to_pylist()[0]
                    yield row, f"{path}, row {number}"
    except UnicodeDecodeError as error:
        raise JaxdynError(f"{path}, row {number} is not UTF-8: {error}") from error
    except JaxdynError:
        raise
    except Exception as error:  # the library raises many kinds
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if not number:
        raise JaxdynError(f"{path} is empty: wanted at least one row")


def _open(path: str | Path) -> Any:
    require_name(str(path))
    return gzip.open(path) if str(path).endswith(".gz") else Path(path).open("rb")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise JaxdynError(f"{where} should hold a JSON object, not {type(row).__name__}")
    return row


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error, kind=False)
