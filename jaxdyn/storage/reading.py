"""What others wrote, read with its sizes and types checked: JSON, logs of a run, arrays by name.

Every reader raises `JaxdynError` of one line, naming the file, for whatever a file may hold; what
it returns has the types that it says. Weights are read in `jaxdyn.models.tensors`, rows of data in
`jaxdyn.data.files`, tokenizers in `jaxdyn.data.tokenizer`.

Imports no JAX.
"""

import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.paths import AnyPath, one_line

SETTINGS_BYTES = 64 * 2**20
"""The most that is read of a file of settings: a tokenizer's or an index of weights is smaller."""

DEPTH = 100
"""How deep objects and lists may lie in each other."""

UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 100
"""An archive that unpacks to more than this, and to more than so many times its size, is refused.
Arrays of measured numbers hardly compress."""

LAST_STEP = 10**9
"""The largest step of a record."""

Record = dict[str, Any]


def read_bytes(path: AnyPath, limit: int | None = None) -> bytes:
    """A file's content; JaxdynError if it cannot be read, or holds more than `limit` bytes, by
    default `SETTINGS_BYTES`."""
    limit = SETTINGS_BYTES if limit is None else limit
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise JaxdynError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a bucket's client raises many kinds
        raise JaxdynError(f"{path} cannot be read: {one_line(error)}") from error
    if len(content) > limit:
        raise JaxdynError(f"{path} holds more than {limit} bytes, the most that is read of it")
    return content


# -- JSON -----------------------------------------------------------------------------------------


def parse_json(content: bytes | str, where: str, unique: bool = False) -> Any:
    """What JSON says; a number in it may be NaN or infinite, which its field refuses.

    Args:
      where: the file, and the line in it, for the message.
      unique: refuse a name given twice in an object.

    Raises:
      JaxdynError: for anything else, and what lies deeper than `DEPTH`.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique} if unique else {}
    try:
        data = json.loads(content, **hooks)
    except UnicodeDecodeError as error:
        raise JaxdynError(f"{where} is not JSON: it is not UTF-8: {error}") from error
    except RecursionError as error:
        raise JaxdynError(f"{where} is not JSON that we read: {_too_deep()}") from error
    except (ValueError, MemoryError) as error:  # a ValueError too where an integer is too long
        raise JaxdynError(f"{where} is not JSON: {one_line(error, kind=False)}") from error
    text = content if isinstance(content, str) else content.decode("latin-1")
    if text.count("[") + text.count("{") > DEPTH:
        _require_shallow(data, where)
    return data


def read_object(path: AnyPath) -> Record:
    """The object that a JSON file of settings holds.

    Raises:
      JaxdynError: for a file that cannot be read, holds anything else, or names a field twice.
    """
    data = parse_json(read_bytes(path), str(path), unique=True)
    if not isinstance(data, dict):
        raise JaxdynError(f"{path} should hold a JSON object, got {shown(data)}")
    return data


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    if isinstance(value, int) and abs(value) > 10**60:
        return f"an integer of more than {60} digits"
    return f"{value!r:.60}"


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.60} is given twice")
    return found


def _require_shallow(data: Any, where: str) -> None:
    level = [data]
    for _ in range(DEPTH):
        level = [x for outer in level for x in _inside(outer)]
        if not level:
            return
    raise JaxdynError(f"{where} is not JSON that we read: {_too_deep()}")


def _inside(value: Any) -> Iterable[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (x for x in values if isinstance(x, dict | list))


def _too_deep() -> str:
    return f"it lies more than {DEPTH} deep"


# -- logs -----------------------------------------------------------------------------------------


def read_records(path: AnyPath) -> list[Record]:
    """The lines of a run's log, each an object with the integer "step" from -1.

    None of them if there is no such file; a last line that a kill cut short is left out.

    Raises:
      JaxdynError: naming the file and the line, for any other that is no record.
    """
    if not path.is_file():
        return []
    content = read_bytes(path, available_memory() // 8)
    lines = content.decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where)
        except JaxdynError:
            if number == len(lines):
                break
            raise
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not -1 <= step <= LAST_STEP:
            wanted = f'an object with an integer "step" of -1 to {LAST_STEP}'
            raise JaxdynError(f"{where} must be {wanted}, got {line[:60]}")
        records.append(record)
    return records


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a logged value is a number that a float holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


# -- arrays ---------------------------------------------------------------------------------------


def read_arrays(path: AnyPath, what: str = "a readable file of arrays") -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, without pickles.

    Args:
      what: the file in words, with an article.

    Raises:
      JaxdynError: if it cannot be read, or would not fit this machine.
      FileNotFoundError: if it is not there.
    """
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
                packed = sum(entry.compress_size for entry in archive.infolist())
                if len(sizes) < len(archive.infolist()):
                    raise ValueError("it names an array twice")
            require_room(path, sum(sizes.values()))
            if sum(sizes.values()) > max(UNPACKED_BYTES, UNPACKED_RATIO * packed):
                _refuse_bomb(path, sum(sizes.values()), packed)
            file.seek(0)
            with np.load(file, allow_pickle=False) as saved:
                found = {name: saved[name] for name in saved.files}
        for name, x in found.items():
            if not isinstance(x, np.ndarray):  # what is no array comes back as bytes
                raise ValueError(f"{name} is no array")
        return found
    except (FileNotFoundError, JaxdynError):
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise JaxdynError(f"{path} is not {what}: {one_line(error)}") from error


def _refuse_bomb(path: AnyPath, total: int, packed: int) -> NoReturn:
    raise JaxdynError(
        f"{path} would unpack from {packed} bytes to {total}, more than {UNPACKED_RATIO} times as "
        "many: that is no file of ours"
    )


# -- memory ---------------------------------------------------------------------------------------


def require_room(path: AnyPath | str, wanted: int) -> None:
    """JaxdynError if what a file says it holds would not fit the memory that is left."""
    there = available_memory()
    if wanted > there:
        raise JaxdynError(
            f"{path} takes {wanted / 1e9:.3g} GB in memory, and {there / 1e9:.3g} GB are available"
        )


def available_memory() -> int:
    """Bytes that this machine, or this container of it, has left; where none says so, 2⁶²."""
    found = [2**62]
    for line in _said("/proc/meminfo").splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            found.append(int(amount.split()[0]) * 1024)
    limit, used = (_said(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        # What files keep in the cache counts as used, and is given up when asked for.
        rows = (line.split() for line in _said("/sys/fs/cgroup/memory.stat").splitlines())
        cached = sum(int(row[1]) for row in rows if row[:1] in (["inactive_file"], ["active_file"]))
        found.append(max(int(limit) - int(used) + cached, 0))
    return min(found)


def _said(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
