"""Rows of files: JSON lines, a JSON list, or Parquet, each with the place it comes from.

Every reader raises JaxdynError, naming the file and the line or row, for what cannot be read.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdyn.types import JaxdynError

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
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield _object(_parsed(line, where), where), where
                    empty = False
    except (OSError, EOFError) as error:  # a gzip that is cut short is the latter
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if empty:
        raise JaxdynError(f"{path} is empty: wanted one JSON object a line")


def listed_rows(path: str | Path) -> Rows:
    """The objects of one JSON list."""
    try:
        with _open(path) as file:
            rows = _parsed(file.read(), str(path))
    except (OSError, EOFError) as error:
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if not isinstance(rows, list) or not rows:
        raise JaxdynError(f"{path} should hold a list of JSON objects, got {rows!r:.60}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield _object(row, where), where


def parquet_rows(path: str | Path, names: tuple[str, ...] | None = None) -> Rows:
    """A Parquet file's rows, or those of its columns that are named."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            columns = None
            if names is not None:
                columns = [name for name in names if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for start in range(len(batch)):
                    number += 1
                    yield batch.slice(start, 1).to_pylist()[0], f"{path}, row {number}"
    except UnicodeDecodeError as error:
        raise JaxdynError(f"{path}, row {number} is not UTF-8: {error}") from error
    except (OSError, ArrowException) as error:
        raise JaxdynError(f"cannot read {path}: {_reason(error)}") from error
    if not number:
        raise JaxdynError(f"{path} is empty: wanted at least one row")


def _open(path: str | Path) -> Any:
    return gzip.open(path) if str(path).endswith(".gz") else Path(path).open("rb")


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise JaxdynError(f"{where} is not JSON: it is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise JaxdynError(f"{where} is not JSON: {error}") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise JaxdynError(f"{where} should hold a JSON object, not {type(row).__name__}")
    return row


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
