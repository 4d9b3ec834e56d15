"""Completions with their advantages, as other trainers log them: JSON lines, or Parquet.

The columns have TRL's names: prompt, completion, advantage.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdyn.data.files import line_rows, parquet_rows
from jaxdyn.data.jsonl import require_texts
from jaxdyn.grammar import MOST
from jaxdyn.storage.reading import is_number, shown
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
    read = parquet_rows(path, (*FIELDS, "advantage")) if parquet else line_rows(path)
    rows = (require_texts(row, FIELDS, where) for row, where in read)
    taken = list(itertools.islice(rows, limit or None))
    advantages = [advantage_of(row, f"{path}, row {n}") for n, row in enumerate(taken, start=1)]
    return Scored(
        [row["prompt"] for row in taken],
        [row["completion"] for row in taken],
        np.array(advantages, np.float32),
        next(rows, None) is not None,
    )


def advantage_of(row: dict[str, Any], where: str) -> float:
    """The row's advantage.

    Raises:
      JaxdynError: if it has none, or it is no finite number.
    """
    if "advantage" not in row:
        raise JaxdynError(f"{where} has no field 'advantage'; it has {', '.join(row):.200}")
    value = row["advantage"]
    if not is_number(value) or abs(value) > MOST:
        what = f"a finite number, in size at most {MOST:g}"
        raise JaxdynError(f"{where}: 'advantage' should be {what}, got {shown(value)}")
    return float(value)
