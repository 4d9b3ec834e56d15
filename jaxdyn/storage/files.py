"""What commands leave on disk: written beside, made durable, then renamed.

So whatever bears a name is whole. A kill or a full disk leaves what bore the name before, and at
most a hidden `.NAME.partial`, which the next try replaces.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.paths import AnyPath, in_bucket, one_line

PARTIAL = ".partial"
"""What the name of something unfinished ends in."""

FULL = (errno.ENOSPC, errno.EDQUOT)

PROBE = "writable"
"""The object that `require_writable` leaves in a bucket for a moment."""


def write_file(path: AnyPath, content: bytes | str) -> None:
    """Write one file; see `write_files`."""
    write_files({path: content})


def write_files(files: Mapping[AnyPath, bytes | str]) -> None:
    """Write files that belong together, in an order of which the last says that all are there.

    All are on the disk before the first gets its name: a full disk leaves all that was there. In a
    bucket, which cannot rename, they are written one after another. A text is written as UTF-8,
    what that cannot say (half of a surrogate pair) as "?".

    Raises:
      JaxdynError: naming the file that cannot be written and why, and on a full disk the room.
    """
    begun: list[tuple[Path, Path]] = []
    try:
        for path, content in files.items():
            data = content.encode(errors="replace") if isinstance(content, str) else content
            with naming(path, len(data)):
                path.parent.mkdir(parents=True, exist_ok=True)
                if in_bucket(path):
                    path.write_bytes(data)
                    continue
                partial = partial_of(path)
                begun.append((partial, path))
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for partial, path in begun:
            with naming(path):
                os.replace(partial, path)
        for folder in {path.parent for _, path in begun}:
            sync_directory(folder)
    except Exception:
        for partial, _ in begun:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_directory(path: Path, needed: int = 0) -> Iterator[Path]:
    """A new directory to fill, which becomes `path` as a whole once the block has ended well.

    A directory that has the name is replaced: whoever calls has seen that it may be.

    Args:
      needed: bytes that will be in it, for the message.

    Raises:
      JaxdynError: naming the directory that cannot be written and why.
    """
    partial, before = partial_of(path), partial_of(path.with_name(path.name + ".before"))
    made = [folder for folder in path.parents if not folder.exists()]
    with naming(path, needed):
        if before.exists() and not path.exists():  # killed between the two renames
            os.rename(before, path)
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with naming(path, needed):
            yield partial
            for file in sorted(p for p in partial.rglob("*") if p.is_file()):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            sync_directory(partial)
            if path.exists() and any(path.iterdir()):
                os.rename(path, before)
            os.rename(partial, path)
            sync_directory(path.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is there by now
            for folder in made:
                folder.rmdir()
        if isinstance(error, JaxdynError):
            raise JaxdynError(str(error).replace(str(partial), str(path))) from error
        raise
    shutil.rmtree(before, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """Where the path's content is while it is unfinished."""
    return path.with_name(f".{path.name}{PARTIAL}")


def is_unfinished(path: AnyPath) -> bool:
    """Whether a path is that of something unfinished."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def sync_directory(path: Path) -> None:
    """Make a directory's new names durable, where its file system knows how."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in FULL:
            raise
    finally:
        os.close(descriptor)


# -- what cannot be written -----------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: AnyPath, needed: int = 0) -> Iterator[None]:
    """An OSError inside becomes a JaxdynError that names the file, and the room it needs."""
    try:
        yield
    except JaxdynError:
        raise
    except OSError as error:
        raise JaxdynError(f"cannot write {path}: {reason(error, path, needed)}") from error
    except Exception as error:
        if not in_bucket(path):
            raise
        raise JaxdynError(f"cannot write {path}: {one_line(error)}") from error  # of many kinds


def reason(error: OSError, path: AnyPath, needed: int = 0) -> str:
    """An error's words, and of a full disk what it had and what was wanted."""
    words = error.strerror or one_line(error)
    if error.filename and Path(os.fsdecode(error.filename)) not in (path, partial_of(Path(path))):
        words += f" ({os.fsdecode(error.filename)})"
    if error.errno not in FULL or in_bucket(path):
        return words
    return words + room(path, needed)


def room(path: AnyPath, needed: int = 0) -> str:
    """How much is free where a path lies, and how much is needed, as the end of a message."""
    free = ""
    with contextlib.suppress(OSError):
        free = f", {size(shutil.disk_usage(_there(path)).free)} free"
    wanted = f"it needs {size(needed)}" if needed else "it needs more room"
    return f" ({wanted}{free})"


def size(count: int) -> str:
    """Bytes to read: 1.5 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"


def require_writable(directory: AnyPath) -> None:
    """See that files can be made in a directory, or in that in which it will be made.

    Leaves nothing, not even the directory; in a bucket an object is written and deleted again.

    Raises:
      JaxdynError: naming the directory and what stands in the way, or the package to install.
    """
    if in_bucket(directory):
        _require_bucket(directory)
        return
    if re.match(r"\w+:/", str(directory)):  # of a URL pathlib makes a directory
        raise JaxdynError(f"cannot write to {directory}: it is no directory of this machine")
    there = _there(directory)
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there):  # has no name on Linux
            pass
    except OSError as error:
        at = "" if there == directory else f" ({there})"
        raise JaxdynError(f"cannot write to {directory}{at}: {reason(error, there)}") from error


def _require_bucket(directory: AnyPath) -> None:
    probe = directory / PROBE
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except ImportError as error:
        raise JaxdynError(f"{directory} needs the package gcsfs: pip install gcsfs") from error
    except Exception as error:  # its client raises many kinds
        raise JaxdynError(f"cannot write to {directory}: {one_line(error)}") from error


def _there(path: AnyPath) -> Path:
    """The path, or the innermost one above it that exists."""
    return next(p for p in (path, *path.parents, Path()) if p.exists())
