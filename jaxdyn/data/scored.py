"""Completions with their advantages, as other trainers log them: JSON lines, or Parquet.

The columns have TRL's names: prompt, completion, advantage.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdyn.data.jsonl import JsonlFile, read_jsonl, require_texts
from jaxdyn.types import JaxdynError

FIELDS = {"prompt": "prompt", "completion": "completion"}


class Scored(NamedTuple):
    """U prompts with their completions and advantages [U]; whether the file had more."""

    prompts: list[str]
    completions: list[str]
    advantages: np.ndarray
    more: bool


def read_scored(path: str, limit: int = 0) -> Scored:
    """The first `limit` rows (0: all) of a file, Parquet if its name ends so.

    Raises:
      JaxdynError: naming the file and the row, if it cannot be read, a column is missing, a text is
        empty or no text, an advantage no finite number.
    """
    parquet = Path(path).suffix == ".parquet"
    rows = (
        read_parquet(path)
        if parquet
        else read_jsonl(JsonlFile(path, completion_field="completion"))
    )
    taken = list(itertools.islice(rows, limit or None))
    advantages = [advantage_of(row, f"{path}, row {n}") for n, row in enumerate(taken, start=1)]
    return Scored(
        [row["prompt"] for row in taken],
        [row["completion"] for row in taken],
        np.array(advantages, np.float32),
        next(rows, None) is not None,
    )


def read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """A file's rows, checked as those of JSON lines."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise JaxdynError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            names = [name for name in (*FIELDS, "advantage") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield require_texts(row, FIELDS, f"{path}, row {number}")
    except (OSError, ArrowInvalid) as error:
        raise JaxdynError(f"cannot read {path}: {error}") from error
    if not number:
        raise JaxdynError(f"{path} is empty: wanted at least one row")


def advantage_of(row: dict[str, Any], where: str) -> float:
    """The row's advantage.

    Raises:
      JaxdynError: if it has none, or it is no finite number.
    """
    if "advantage" not in row:
        raise JaxdynError(f"{where} has no field 'advantage'; it has {', '.join(row)}")
    value = row["advantage"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JaxdynError(f"{where}: 'advantage' should be a finite number, got {value!r:.60}")
    return float(value)
