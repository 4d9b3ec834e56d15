r"""Sketches of many gradients in a file, filled row by row and read through memory maps.

The file is a safetensors file: `rows` [N, 2, R, p²] in float32 (of each gradient its sketch through
the classifier and that through the backbone), then texts of each row, end to end, with where they
end. Beside the sketches' own error, about 1/√(R p²) of the norms, float32 adds nothing.

While it is filled it has a hidden name, and a hidden record says how many rows are on the disk: the
same call goes on from there.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxdyn.hosts import from_first
from jaxdyn.kernels.execution import Execution, require_options
from jaxdyn.kernels.rows import sequence_rows, site_rows
from jaxdyn.kernels.sketch import Sketch, sketched, words_of
from jaxdyn.kernels.store import digest
from jaxdyn.storage.files import naming, partial_of, sync_directory, write_file
from jaxdyn.storage.paths import one_line
from jaxdyn.storage.reading import parse_json
from jaxdyn.types import JaxdynError, Model, Params, Rollout, Sites

FORMAT = "jaxdyn sketches 1"

SECONDS = 5.0
"""How often the rows that were found are made durable."""

_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}


@dataclasses.dataclass(frozen=True)
class SketchFile:
    """N stored sketches.

    Attributes:
      path: the file.
      rows: [N, 2, R, p²], mapped: through the classifier, and through the backbone.
      key: of the projections; see `Sketch`.
      config: the model's configuration, as JSON has it.
      preconditioned: whether they are in an optimizer's metric.
      about: what else was said of them.
      texts: by name N texts as one array of bytes, and where each ends [N].
    """

    path: Path
    rows: np.ndarray
    key: tuple[int, int]
    config: dict[str, Any]
    preconditioned: bool
    about: dict[str, Any]
    texts: dict[str, tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def replicates(self) -> int:
        """R."""
        return self.rows.shape[2]

    @property
    def side(self) -> int:
        """p."""
        return math.isqrt(self.rows.shape[3])

    def take(self, which: Any, config: Any) -> Sketch:
        """The rows numbered `which`, a slice or a list of indices, to compare with others.

        Args:
          config: of the model that the others are of.

        Raises:
          JaxdynError: if the rows are of another model.
        """
        self.require_model(config)
        taken = np.asarray(self.rows[which])
        head, body = jnp.asarray(taken[:, 0]), jnp.asarray(taken[:, 1])
        return Sketch(head, body, self.key, config, self.preconditioned)

    def require_model(self, config: Any) -> None:
        """JaxdynError if the rows are of a model of another configuration."""
        own = as_said(config)
        for name in sorted(own.keys() | self.config.keys()):
            if own.get(name) != self.config.get(name):
                raise JaxdynError(
                    f"{self.path} is of another model: {name} is {self.config.get(name)!r:.60} "
                    f"there, got {own.get(name)!r:.60}"
                )

    def text(self, name: str, row: int) -> str:
        """A row's text, or nothing where none was stored."""
        if name not in self.texts:
            return ""
        content, ends = self.texts[name]
        start = int(ends[row - 1]) if row else 0
        return content[start : int(ends[row])].tobytes().decode("utf-8", errors="replace")


def store_sketches(
    path: str | Path,
    model: Model,
    params: Params,
    places: Sites | Rollout,
    key: PRNGKeyArray | tuple[int, int],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    about: Mapping[str, Any] | None = None,
    preconditioner: Params | None = None,
    replicates: int = 64,
    side: int = 8,
    **execution: Unpack[Execution],
) -> SketchFile:
    """`sketch_gradients` of sites, or `sketch_sequences` of completions, into a file of 8 R p² N
    bytes; memory holds as many rows as are taken at a time.

    A call that was killed goes on when it is made again.

    Args:
      path: the file; one that is there is replaced.
      places: N sites, or N completions.
      texts: of each row, by name; `open_sketches(path).text(name, row)` gives it again.
      about: more to say of them, as JSON has it.

    For the other arguments see `sketch_gradients`.

    Raises:
      JaxdynError: as `sketch_gradients`; and if what was begun there is something else.
    """
    require_options(execution, "memory_budget", "progress")
    path, words = Path(path), words_of(key)
    if isinstance(places, Rollout):
        rows = sequence_rows(model, places, None, "rollout")
    else:
        rows = site_rows(model, places, "sites")
    count = len(rows.tokens)
    said = {
        "format": FORMAT,
        "key": words,
        "config": as_said(model.config),
        "preconditioned": preconditioner is not None,
        "params": digest(params),
        "about": dict(about or {}),
    }
    header = _Header(said, (count, 2, replicates, side**2), texts or {})
    content = [said, list(header.shape), digest(rows), digest(preconditioner)]
    first = jax.process_index() == 0
    filled = _Filled(path, header, json.dumps(content)) if first else None
    start = int(from_first(np.array(0 if filled is None else filled.done)))
    how = preconditioner, replicates, side, execution
    for head, body in sketched(model, params, rows, words, *how, start):
        if filled is not None:
            filled.add(np.stack([head, body], axis=1))
    if filled is not None:
        filled.finish()
    return open_sketches(path)


def open_sketches(path: str | Path) -> SketchFile:
    """The sketches of a file, mapped and not read.

    Raises:
      JaxdynError: if it cannot be read, is cut short, or is no file of sketches.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise JaxdynError(f"{path} is not a whole file of sketches: it has {size} bytes")
            described = parse_json(file.read(length), str(path))
    except OSError as error:
        raise JaxdynError(f"cannot read the sketches {path}: {error.strerror or error}") from error
    try:
        said = parse_json(described.pop("__metadata__")["jaxdyn"], str(path))
        if said["format"] != FORMAT:
            raise ValueError(f"wanted {FORMAT!r}, got {said['format']!r:.60}")
        arrays = {name: _mapped(path, 8 + length, size, at) for name, at in described.items()}
        rows, key = arrays.pop("rows"), said["key"]
        texts = {
            name.removeprefix("text/"): (arrays[name], arrays[name.replace("text/", "ends/", 1)])
            for name in arrays
            if name.startswith("text/")
        }
        whole = rows.ndim == 4 and rows.shape[1] == 2 and rows.dtype == _TYPES["F32"]
        if not whole or math.isqrt(rows.shape[3]) ** 2 != rows.shape[3] or rows.shape[2] < 2:
            raise ValueError(f"rows should be [N, 2, R, p²] of float32, got {list(rows.shape)}")
        if [type(x) for x in key] != [int, int] or not all(0 <= x < 2**32 for x in key):
            raise ValueError(f"key should be two words, got {key!r:.60}")
        for name, (content, ends) in texts.items():
            _require_texts(name, content, ends, len(rows))
        kinds = {"config": dict, "about": dict, "preconditioned": bool, "params": str}
        for name, kind in kinds.items():
            if type(said[name]) is not kind:
                raise ValueError(f"{name} is {said[name]!r:.60}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{one_line(error):.200}"
        raise JaxdynError(f"{path} is not a whole file of sketches: {reason}") from error
    if not len(rows):
        raise JaxdynError(f"{path} holds no sketches")
    fields = (said["config"], said["preconditioned"], said["about"] | {"params": said["params"]})
    return SketchFile(path, rows, (key[0], key[1]), *fields, texts)


def as_said(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


# -- the file's form ------------------------------------------------------------------------------


class _Header:
    """The file's first bytes: what is where; and the texts, which come before the rows."""

    def __init__(self, said: dict, shape: tuple[int, ...], texts: Mapping[str, Sequence[str]]):
        self.shape = shape
        arrays: dict[str, np.ndarray] = {}
        for name, strings in texts.items():
            if len(strings) != shape[0]:
                raise JaxdynError(f"texts[{name!r}] must be {shape[0]} texts, got {len(strings)}")
            coded = [text.encode(errors="replace") for text in strings]
            arrays[f"ends/{name}"] = np.cumsum([len(x) for x in coded], dtype="<i8")
            arrays[f"text/{name}"] = np.frombuffer(b"".join(coded), "u1")
        arrays = dict(sorted(arrays.items()))  # the ends first, which are to lie on words
        sizes = [x.nbytes for x in arrays.values()]
        gap = -sum(sizes) % 8
        if gap:
            arrays["padding"] = np.zeros(gap, "u1")
        table: dict[str, Any] = {"__metadata__": {"jaxdyn": json.dumps(said)}}
        at = 0
        names = {kind: name for name, kind in _TYPES.items()}
        for name, x in arrays.items():
            table[name] = _entry(names[x.dtype], x.shape, at, at + x.nbytes)
            at += x.nbytes
        self.rows_bytes = 4 * math.prod(shape)
        table["rows"] = _entry("F32", shape, at, at + self.rows_bytes)
        listed = json.dumps(table).encode()
        listed += b" " * (-len(listed) % 8)
        parts = (len(listed).to_bytes(8, "little"), listed, *(x.tobytes() for x in arrays.values()))
        self.content = b"".join(parts)


class _Filled:
    """The file while its rows are found; `done` of them are on the disk."""

    def __init__(self, path: Path, header: _Header, content: str):
        self.path, self.partial = path, partial_of(path)
        self.record = partial_of(path.with_name(f"{path.name}.rows"))
        self.done, self.content, self.kept = 0, content, time.monotonic()
        size = len(header.content) + header.rows_bytes
        with naming(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.record.exists() and self.partial.exists():
                self.done = self._begun(header.shape[0], size)
            else:
                self.record.unlink(missing_ok=True)  # of a file that is gone
                with open(self.partial, "wb") as file:
                    file.write(header.content)
                    file.truncate(size)
            kind = _TYPES["F32"]
            self.rows = np.memmap(self.partial, kind, "r+", len(header.content), header.shape)
        self.at = self.done

    def add(self, found: np.ndarray) -> None:
        """Take up the next rows."""
        self.rows[self.at : self.at + len(found)] = found
        self.at += len(found)
        if time.monotonic() - self.kept >= SECONDS:
            self._keep()

    def finish(self) -> None:
        """Give the whole file its name."""
        self._keep()
        del self.rows
        with naming(self.path):
            os.replace(self.partial, self.path)
            self.record.unlink()
            sync_directory(self.path.parent)

    def _keep(self) -> None:
        with naming(self.path):
            self.rows.flush()
            write_file(self.record, json.dumps({"rows": self.at, "content": self.content}))
        self.kept = time.monotonic()

    def _begun(self, count: int, size: int) -> int:
        said = parse_json(self.record.read_bytes(), str(self.record))
        rows = said.get("rows") if isinstance(said, dict) else None
        same = isinstance(said, dict) and said.get("content") == self.content
        same &= self.partial.stat().st_size == size
        if same and isinstance(rows, int) and 0 <= rows <= count:
            return rows
        raise JaxdynError(
            f"{self.partial} are unfinished sketches of something else (other parameters, texts or "
            "options): name another output, or delete them"
        )


def _entry(kind: str, shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}


def _mapped(path: Path, start: int, size: int, entry: dict[str, Any]) -> np.ndarray:
    """An array of the file by its entry in the header."""
    kind, shape, (first, last) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    sizes = [*shape, first, last]
    if any(type(x) is not int or x < 0 for x in sizes) or last > size - start:
        raise ValueError(f"it is cut short, or its header is wrong: {sizes} of {size - start}")
    if math.prod(shape) * kind.itemsize != last - first:
        raise ValueError(f"{shape} of {kind} does not take {last - first} bytes")
    if not math.prod(shape):
        return np.zeros(shape, kind)
    return np.memmap(path, kind, "r", start + first, tuple(shape))


def _require_texts(name: str, content: np.ndarray, ends: np.ndarray, count: int) -> None:
    right = ends.dtype == _TYPES["I64"] and ends.shape == (count,) and content.ndim == 1
    if not right or np.any(np.diff(ends, prepend=0) < 0) or (count and ends[-1] > len(content)):
        raise ValueError(f"the texts {name!r:.60} should be {count} by their ends")
