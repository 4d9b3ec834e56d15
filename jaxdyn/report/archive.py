"""Arrays and what they are in one .npz, without pickles: the form of every file that we read again.

It imports no JAX, so that a file is read anywhere.
"""

import fnmatch
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.paths import open_path
from jaxdyn.storage.reading import parse_json, read_arrays


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
        arrays = read_arrays(open_path(path), what)
    except FileNotFoundError as error:
        raise JaxdynError(f"no such {what.split(' ', 1)[1]}: {path}") from error
    try:
        about = parse_json(str(arrays.pop("about", "")), str(path))
    except JaxdynError as error:
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


Forms = dict[str, tuple[str, str]]
"""Of arrays by name, where a * stands for anything: NumPy's letters of the dtype's kind, and the
axes: numbers, or names of sizes that must agree in a file but for those in brackets."""


def require_forms(path: str | Path, arrays: dict[str, np.ndarray], forms: Forms) -> dict[str, int]:
    """The sizes by their names; JaxdynError for an array of another shape or kind."""
    sizes: dict[str, int] = {}
    for pattern, (kinds, axes) in forms.items():
        for name in fnmatch.filter(arrays, pattern):
            x, names = arrays[name], axes.split()
            agree = x.ndim == len(names)
            for axis, size in zip(names, x.shape, strict=True) if agree else ():
                if axis[0] != "(":
                    agree &= size == sizes.setdefault(axis, int(axis) if axis.isdigit() else size)
            if not agree:
                wanted = ", ".join(str(sizes.get(axis, axis)) for axis in names)
                raise JaxdynError(f"{path}: {name} should be [{wanted}], got {list(x.shape)}")
            if x.dtype.kind not in kinds:
                raise JaxdynError(f"{path}: {name} should be {_KINDS[kinds]}, got {x.dtype}")
    return sizes


_KINDS = {"f": "floats", "iu": "integers", "b": "booleans", "U": "texts"}
