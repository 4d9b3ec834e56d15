"""Where examples come from: a data set is built once, stored as array_record, read by index.

TensorFlow Datasets is imported when a data set is first used; TensorFlow never is.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxdyn.data.anagrams import AnagramsConfig
from jaxdyn.data.jsonl import JsonlFile
from jaxdyn.data.stories import StoriesConfig
from jaxdyn.types import JaxdynError

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples to use."""

    name: Literal["anagrams", "stories", "jsonl"] = "anagrams"
    """`anagrams` (procedural), `stories` (openings) or `jsonl` (a file of your own)."""
    path: str | None = None
    """jsonl: the file, one JSON object a line."""
    test_path: str | None = None
    """jsonl: the file of the test split; without it a share `held_out` of `path` is held out."""
    prompt_field: str = "prompt"
    """jsonl: the field that holds the prompt."""
    completion_field: str | None = None
    """jsonl: the field that holds the supervised completion, if there is one."""
    held_out: float = 0.1
    """jsonl: share of the rows in the test split when there is no `test_path`, in (0, 1)."""
    anagrams: AnagramsConfig = AnagramsConfig()
    stories: StoriesConfig = StoriesConfig()
    cache_dir: str | None = None
    """Where built data sets are kept; default $JAXDYN_CACHE, else ~/.cache/jaxdyn."""

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise JaxdynError(f"data: held_out must lie in (0, 1), got {self.held_out}")


class Source(Sequence):
    """Examples by index: dictionaries of texts, numbers and lists."""

    def __init__(self, records: Sequence[Any]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self._records[range(len(self))[index]]
        if "json" in record:
            return json.loads(record["json"])
        return {column: _plain(value) for column, value in record.items()}


def load_source(config: DataConfig, split: str) -> Source:
    """The `train` or `test` examples of a data set, built on first use.

    A jsonl file's rows are in an order that depends on the file alone; without a `test_path` the
    test split is the first share `held_out` of them (at least one) and the train split the rest.

    Raises JaxdynError if the split is unknown or would be empty, if the file is missing, empty or
    malformed (with its line), or if the cache cannot be written.
    """
    if split not in ("train", "test"):
        raise JaxdynError(f"unknown split {split!r}: wanted 'train' or 'test'")
    # TensorFlow Datasets takes a third of a second to import: only when it is needed.
    if config.name == "anagrams":
        from jaxdyn.data.builders.anagrams import Anagrams

        return Source(_built(Anagrams, config.anagrams, config).as_data_source(split))
    if config.name == "stories":
        from jaxdyn.data.builders.stories import Stories

        return Source(_built(Stories, config.stories, config).as_data_source(split))
    return Source(_jsonl(config, split))


def columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Examples as columns: every key that any of them has, None where one lacks it."""
    keys = dict.fromkeys(key for example in examples for key in example)
    return {key: [example.get(key) for example in examples] for key in keys}


def _jsonl(config: DataConfig, split: str) -> Sequence[Any]:
    """The records of one of the splits that a file, or two, are divided into."""
    from jaxdyn.data.builders.jsonl import Jsonl

    if config.path is None:
        raise JaxdynError("the data set 'jsonl' needs a path")
    path = config.test_path if split == "test" and config.test_path else config.path
    file = JsonlFile(path, config.prompt_field, config.completion_field)
    builder = _built(Jsonl, file, config)
    if config.test_path:
        return builder.as_data_source("train")
    rows = builder.info.splits["train"].num_examples
    if rows < 2:
        raise JaxdynError(f"{path} has one row, too few to hold some out: give a test_path too")
    held_out = min(max(1, round(config.held_out * rows)), rows - 1)
    return builder.as_data_source(
        f"train[:{held_out}]" if split == "test" else f"train[{held_out}:]"
    )


def _built(builder_class: Any, options: Any, config: DataConfig) -> Any:
    """The builder with its data in the cache, under a key of everything the data depends on.

    It is built in a directory of its own and moved into place by one rename, so that neither an
    interrupted build nor two at once leave anything half-written behind.
    """
    root = config.cache_dir or os.environ.get("JAXDYN_CACHE") or "~/.cache/jaxdyn"
    parent = Path(root).expanduser() / builder_class.name
    directory = parent / _key(builder_class, options)
    make = lambda where: builder_class(
        options=options, data_dir=str(where), file_format="array_record"
    )
    try:
        if not directory.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".building-", dir=parent) as scratch:
                built = Path(scratch) / "data"
                with contextlib.redirect_stdout(io.StringIO()):
                    make(built).download_and_prepare()
                try:
                    built.rename(directory)
                except OSError:  # another process was first: its data are the same
                    if not directory.is_dir():
                        raise
        return make(directory)
    except (OSError, RuntimeError) as error:  # a full disk reaches us as either
        raise JaxdynError(
            f"cannot build the data set {builder_class.name} in {parent}: "
            f"{' '.join(str(error).split())}"
        ) from error


def _key(builder_class: Any, options: Any) -> str:
    """A hash of the builder's version and its options, with a file's content for its path."""
    if isinstance(options, JsonlFile):
        try:
            with Path(options.path).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise JaxdynError(f"cannot read {options.path}: {error.strerror or error}") from error
        options = dataclasses.replace(options, path=content)
    return hashlib.sha256(f"{builder_class.VERSION} {options}".encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A stored value as the text, number or list it was."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
