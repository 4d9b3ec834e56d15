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
      JaxdynError: for another store, no bucket, or a text that names no path.
    """
    require_name(os.fspath(text))
    scheme, separator, rest = os.fspath(text).partition("://")
    if not separator:
        return Path(text)
    if scheme != "gs" or not rest.strip("/"):
        raise JaxdynError(f"expected a directory or gs://BUCKET/FOLDER, got {os.fspath(text)}")
    return epath.Path(text)


def require_name(text: str, what: str = "a path") -> str:
    """The text; JaxdynError if it has a NUL or half a character, which no file system takes."""
    if "\0" in text:
        raise JaxdynError(f"{what} cannot have a NUL in it, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JaxdynError(f"{what} must be valid Unicode, got {text!a:.80}") from None
    return text


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


def is_directory(path: AnyPath) -> bool:
    """Whether there is such a directory.

    Raises:
      JaxdynError: if a bucket cannot be asked, naming the package to install, or what it said.
    """
    try:
        return path.is_dir()
    except OSError:
        raise
    except ImportError as error:
        raise JaxdynError(f"{path} needs the package gcsfs: pip install gcsfs") from error
    except Exception as error:  # its client raises many kinds
        raise JaxdynError(f"cannot read {path}: {one_line(error)}") from error


def one_line(error: BaseException, kind: bool = True) -> str:
    """An error's kind, unless it goes without saying, and text, on a line."""
    text = f"{type(error).__name__}: {error}" if kind or not str(error) else str(error)
    return " ".join(text.split())[:200]
