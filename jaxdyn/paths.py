"""Paths on disk or in a Cloud Storage bucket, of one interface: pathlib's, and etils' for gs://."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from jaxdyn.errors import JaxdynError

# Else etils reads buckets with TensorFlow wherever it is installed; gcsfs does without.
os.environ.setdefault("EPATH_USE_TF", "false")

if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = Path | epath.Path


def open_path(text: str | os.PathLike) -> AnyPath:
    """The path that a text names: `gs://BUCKET/…`, or on disk.

    Raises:
      JaxdynError: for another store, or no bucket.
    """
    scheme, separator, rest = os.fspath(text).partition("://")
    if not separator:
        return Path(text)
    if scheme != "gs" or not rest.strip("/"):
        raise JaxdynError(f"expected a directory or gs://BUCKET/FOLDER, got {os.fspath(text)}")
    return epath.Path(text)


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root, links resolved; in a bucket as it is."""
    return path if in_bucket(path) else path.resolve()


def common_parent(paths: Sequence[AnyPath]) -> AnyPath:
    """The innermost directory of absolute paths, itself or above, that holds them all."""
    above = (paths[0], *paths[0].parents)
    return next(p for p in above if all(path.is_relative_to(p) for path in paths))


def in_bucket(path: AnyPath) -> bool:
    """Whether the path is in a bucket: whole objects, no appending, no renaming."""
    return not isinstance(path, Path)


def one_line(error: BaseException) -> str:
    """An error's kind and text, on a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
