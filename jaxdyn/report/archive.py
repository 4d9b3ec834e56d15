"""Arrays and what they are in one .npz, without pickles: the form of every file that we read again.

It imports no JAX, so that a file is read anywhere.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn.errors import JaxdynError

_UNREADABLE = (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile)


def packed_archive(kind: str, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays by name, compressed, and the description as JSON with its `format` = `kind`."""
    described = json.dumps({"format": kind, **about}, ensure_ascii=False)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, about=described, **arrays)
    return buffer.getvalue()


def read_archive(
    path: str | Path, what: str, kinds: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description, of which the first of the `kinds` is the newest.

    Args:
      what: the file in words, with an article: "a kernel file".

    Raises:
      JaxdynError: if it cannot be read, or is of another kind.
    """
    try:
        # NumPy leaves a file open that it opened itself and could not read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except FileNotFoundError as error:
        raise JaxdynError(f"no such {what.split(' ', 1)[1]}: {path}") from error
    except _UNREADABLE as error:
        raise JaxdynError(f"{path} is not {what}: {error}") from error
    try:
        about = json.loads(str(arrays.pop("about", "")))
    except ValueError as error:
        raise JaxdynError(f"{path} is not {what}: it has no description") from error
    found = about.pop("format", None) if isinstance(about, dict) else None
    if found not in kinds:
        raise JaxdynError(f"{path} is not {what}: wanted {kinds[0]!r}, got {found!r}")
    return arrays, about


def require_arrays(path: str | Path, what: str, wanted: Iterable[str], there: Any) -> None:
    """JaxdynError for the first of the names that is not there."""
    for name in wanted:
        if name not in there:
            whole = what.replace(" ", " whole ", 1).replace("an ", "a ")
            raise JaxdynError(f"{path} is not {whole}: it has no {name}")


def require_shape(path: str | Path, name: str, x: np.ndarray, shape: tuple[int, ...]) -> None:
    """JaxdynError for an array of another shape."""
    if x.shape != shape:
        raise JaxdynError(f"{path}: {name} should be {list(shape)}, got {list(x.shape)}")
