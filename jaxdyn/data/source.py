"""Where examples come from: a data set is built once, stored as array_record, read by index.

TensorFlow Datasets is imported when a data set is first used; TensorFlow never is.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdyn.data.anagrams import AnagramsConfig, anagrams
from jaxdyn.data.examples import Example, jsonl_examples, parquet_examples
from jaxdyn.data.jsonl import JsonlFile
from jaxdyn.data.public import PUBLIC, PublicFiles, public_examples, public_files
from jaxdyn.data.stories import StoriesConfig, stories
from jaxdyn.grammar import between
from jaxdyn.storage.reading import parse_json
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples to use.

    Attributes:
      name: anagrams (procedural), stories (openings), a file of your own (jsonl, parquet), or a
        public data set, fetched from the Hugging Face hub.
      subset: which part of a public data set: of math a subject, of hh_rlhf a folder, of
        alpaca_farm unlabeled, sft, gpt4_preference or human_preference; by default the first, or
        all subjects.
      path: the file: one JSON object a line, or Parquet; of a public data set a copy, a file or a
        directory, which is read instead of the hub.
      test_path: the file of the test split; without it a share `held_out` of `path`.
      prompt_field: the field that holds the prompt, a text or a list of messages; `messages` will
        do where there is no `prompt`.
      completion_field: the field that holds the supervised completion, if there is one.
      held_out: share of a file's rows in the test split when there is no `test_path`.
      prompt_template: how messages become a text: by the checkpoint's own template (chat, which
        takes a text for a user's message) or by one for base models (plain, hh, alpaca); auto is
        chat for messages and leaves texts as they are, none leaves all and refuses messages.
      chat_template_kwargs: more variables of the checkpoint's template, a JSON object, such as
        {"enable_thinking": false}.
      template_date: what a template takes for today: one day, so that a run can be repeated.
      overlong: what happens to prompts of more than train.max_prompt_length tokens: error, drop, or
        truncate-left, which keeps their ends.
      cache_dir: where built data sets are kept; default $JAXDYN_CACHE, else ~/.cache/jaxdyn.
    """

    name: Literal[
        "anagrams",
        "stories",
        "jsonl",
        "parquet",
        "gsm8k",
        "math",
        "ultrafeedback",
        "hh_rlhf",
        "alpaca_farm",
    ] = "anagrams"
    subset: str | None = None
    path: str | None = None
    test_path: str | None = None
    prompt_field: str = "prompt"
    completion_field: str | None = None
    held_out: float = 0.1
    prompt_template: Literal["auto", "chat", "plain", "hh", "alpaca", "none"] = "auto"
    chat_template_kwargs: str = "{}"
    template_date: str = "2024-07-26"
    overlong: Literal["error", "drop", "truncate-left"] = "error"
    anagrams: AnagramsConfig = AnagramsConfig()
    stories: StoriesConfig = StoriesConfig()
    cache_dir: str | None = None

    def __post_init__(self):
        between(0, 1, self, "data", "held_out", ends="()")
        try:
            told = parse_json(self.chat_template_kwargs, "data.chat_template_kwargs")
        except JaxdynError:
            told = None
        if not isinstance(told, dict):
            raise JaxdynError(
                "data.chat_template_kwargs must be a JSON object, got "
                f"{self.chat_template_kwargs!r:.60}"
            )
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError as error:
            raise JaxdynError(
                f"data.template_date must be a day, YYYY-MM-DD, got {self.template_date!r:.60}"
            ) from error


class DataSet(NamedTuple):
    """A row of the table.

    `generate(options, split)` yields examples whose `columns` are texts (str) or lists of texts
    (list). A new `version` leaves what was built by an older one behind. The options are the
    section of `DataConfig` of the set's name; of a set `of_files` they are a `JsonlFile` or
    `PublicFiles`, of whose rows a share is held out where there are no others for testing.
    """

    generate: Callable[[Any, str], Iterator[dict[str, Any]]]
    columns: dict[str, type]
    version: str = "1.0.0"
    of_files: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """What is built: a file's rows are divided when they are read."""
        return ("train",) if self.of_files else ("train", "test")


SETS: dict[str, DataSet] = {
    "anagrams": DataSet(anagrams, {"prompt": str, "completion": str, "letters": str}),
    "stories": DataSet(stories, {"prompt": str, "words": list}),
    "jsonl": DataSet(jsonl_examples, {"json": str}, of_files=True),
    "parquet": DataSet(parquet_examples, {"json": str}, of_files=True),
    **{name: DataSet(public_examples, {"json": str}, of_files=True) for name in PUBLIC},
}
"""Every data set by its `name`; another one is another row, and a section if it has options."""


class Source(Sequence):
    """Examples by index: dictionaries of texts, numbers and lists.

    Attributes:
      key: tells one from another.
      left_out: by the directory of the built data, how many rows it could not use.
    """

    def __init__(self, records: Sequence[Any], directory: str, part: str, left_out: int = 0):
        self._records, self.key = records, f"{directory} {part}"
        self.left_out = {directory: left_out}

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
    if config.subset is not None and config.name not in PUBLIC:
        raise JaxdynError(
            f"data.subset is of public data sets ({', '.join(PUBLIC)}), got {config.subset!r} for "
            f"{config.name}"
        )
    if split not in ("train", "test"):
        raise JaxdynError(f"unknown split {split!r}: wanted 'train' or 'test'")
    if SETS[config.name].of_files:
        builder, part = _share_of_files(config, split)
    else:
        builder, part = _built(config, getattr(config, config.name)), split
    left_out = (builder.info.metadata or {}).get("left_out", 0)
    return Source(builder.as_data_source(part), str(builder.data_path), part, left_out)


def cache_root(config: DataConfig) -> Path:
    """Where built data sets are kept."""
    root = config.cache_dir or os.environ.get("JAXDYN_CACHE") or "~/.cache/jaxdyn"
    return Path(root).expanduser()


def columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Examples as columns: every key that any of them has, None where one lacks it."""
    keys = dict.fromkeys(key for example in examples for key in example)
    return {key: [example.get(key) for example in examples] for key in keys}


def _share_of_files(config: DataConfig, split: str) -> tuple[Any, str]:
    """One of the splits that files are divided into: the builder, and its rows."""
    train, test = _files(config)
    if test is not None:
        return _built(config, test if split == "test" else train), "train"
    builder = _built(config, train)
    rows = builder.info.splits["train"].num_examples
    if rows < 2:
        raise JaxdynError(
            f"{config.path} has one row, too few to hold some out: set data.test_path too"
        )
    held_out = min(max(1, round(config.held_out * rows)), rows - 1)
    share = f"[:{held_out}]" if split == "test" else f"[{held_out}:]"
    return builder, f"train{share}"


def _files(config: DataConfig) -> tuple[Any, Any]:
    """The options of the train split's files, and of the test split's if they are others."""
    if config.name in PUBLIC:
        return public_files(config.name, config.subset, config.path, config.test_path)
    if config.path is None:
        raise JaxdynError(f"data.path must name a file for data.name {config.name!r}, got None")
    file = JsonlFile(config.path, config.prompt_field, config.completion_field)
    other = config.test_path and dataclasses.replace(file, path=config.test_path)
    return file, other or None


def _built(config: DataConfig, options: Any) -> Any:
    """The builder with its data in the cache, under a key of everything the data depends on.

    It is built in a directory of its own and moved into place by one rename, so that neither an
    interrupted build nor two at once leave anything half-written behind.
    """
    # TensorFlow Datasets takes a third of a second to import: only when it is needed.
    from jaxdyn.data.builders.table import Table

    data_set = SETS[config.name]
    parent = cache_root(config) / config.name
    directory = parent / _key(data_set, options)
    make = lambda where: Table(config.name, data_set, options, data_dir=str(where))
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
            f"cannot build the data set {config.name} in {parent}: {' '.join(str(error).split())}"
        ) from error


def _key(data_set: DataSet, options: Any) -> str:
    """A hash of the data set's version and its options, with files' contents for their paths."""
    if isinstance(options, JsonlFile):
        options = dataclasses.replace(options, path=_digest(options.path))
    elif isinstance(options, PublicFiles):
        revision = (PUBLIC[options.name].revision,)
        contents = tuple(map(_digest, options.files)) if options.local else revision
        options = dataclasses.replace(options, files=options.files * (not options.local) + contents)
    return hashlib.sha256(f"{data_set.version} {options}".encode()).hexdigest()[:16]


def _digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JaxdynError(f"cannot read {path}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    """A stored value as the text, number or list it was."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
