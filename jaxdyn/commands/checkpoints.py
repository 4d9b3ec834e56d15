"""Checkpoints by their names on a command line, as parameter trees of one model.

A name is a Hugging Face directory, a name on the hub, a run (all its kept checkpoints), RUN@STEP,
or a PEFT adapter's directory, which is added to the first.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxdyn.data import Tokenizer
from jaxdyn.models import (
    LanguageModel,
    has_adapters,
    load_pretrained,
    local_directory,
    merge_adapters,
    pretrained_config,
)
from jaxdyn.models.peft import add_peft, is_peft
from jaxdyn.train.saved import SavedRun, open_run, require_policy
from jaxdyn.train.task import open_tokenizer
from jaxdyn.types import JaxdynError, Params

_FREE = {"tied", "lora_scale"}
"""Fields of a configuration in which checkpoints may differ, for they are brought to one form."""


class Checkpoint(NamedTuple):
    """A checkpoint's name, its model (with adapters or not) and tokenizer, and the way to its
    parameters, as stored."""

    name: str
    model: LanguageModel
    adapted: bool
    tokenizer: Tokenizer
    load: Callable[[], Params]


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """K + 1 checkpoints of one model; iterating loads their parameters one by one.

    Attributes:
      model: the model of all of them.
      tokenizer: the first's.
      names: theirs.
      strangers: those whose tokenizer differs from the first's.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    names: list[str]
    strangers: list[str]
    _load: Callable[[int], Params]

    def __getitem__(self, number: int) -> Params:
        return self._load(number)

    def __iter__(self) -> Iterator[Params]:
        return (self._load(number) for number in range(len(self.names)))


@contextlib.contextmanager
def open_checkpoints(names: tuple[str, ...], dtype: Any) -> Iterator[Checkpoints]:
    """Open checkpoints by their names, computing in `dtype`, with float32 parameters (or float64).

    Adapters stay beside the weights where all checkpoints have them, and are merged elsewhere; if
    one checkpoint's classifier is its own and another's tied, the tied get a copy.

    Raises:
      JaxdynError: if one cannot be read, they are of different architectures or vocabularies, or
        there are fewer than two.
    """
    with contextlib.ExitStack() as stack:
        found: list[Checkpoint] = []
        for name in names:
            found += _named(name, found, stack)
        if len(found) < 2:
            said = f"{names[0]} alone" if names else "none"
            raise JaxdynError(f"two checkpoints or more are wanted, got {said}")
        first = found[0]
        for other in found[1:]:
            _require_alike(first, other)
        merged = not all(checkpoint.adapted for checkpoint in found)
        untie = len({checkpoint.model.config.tied for checkpoint in found}) > 1
        written = lambda checkpoint: checkpoint.tokenizer.backend.to_str()

        def form(checkpoint: Checkpoint) -> tuple[LanguageModel, Params]:
            model, params = checkpoint.model, checkpoint.load()
            if merged:
                model, params = merge_adapters(model, params)
            if untie and model.config.tied:
                model, params = model.untie(params)
            # A run's frozen matrices may be narrower.
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            return dataclasses.replace(model, dtype=dtype), params

        yield Checkpoints(
            form(first)[0],
            first.tokenizer,
            [checkpoint.name for checkpoint in found],
            [checkpoint.name for checkpoint in found if written(checkpoint) != written(first)],
            lambda number: form(found[number])[1],
        )


def _named(name: str, before: list[Checkpoint], stack: contextlib.ExitStack) -> list[Checkpoint]:
    """What a name means: one checkpoint, or all of a run's."""
    path, at, step = name.rpartition("@")
    if at and _is_run(path):
        if step != "best" and not step.isdigit():
            raise JaxdynError(f"{name}: a run's step is a number or 'best', got {step!r}")
        run = stack.enter_context(open_run(path))
        return [_of_run(run, run.find("best" if step == "best" else int(step)))]
    if _is_run(name):
        run = stack.enter_context(open_run(name))
        return [_of_run(run, step) for step in run.steps]
    if is_peft(Path(name)):
        if not before:
            raise JaxdynError(f"{name} is an adapter: name the model it belongs to first")
        return [_with_adapter(before[0], Path(name))]
    directory = local_directory(name)
    model = LanguageModel(pretrained_config(directory))
    load = lambda: load_pretrained(directory)[1]
    return [Checkpoint(name, model, False, open_tokenizer(directory, model), load)]


def _is_run(path: str) -> bool:
    return (Path(path) / "checkpoints").is_dir()


def _of_run(run: SavedRun, step: int) -> Checkpoint:
    require_policy(run)
    loaded = run.loaded
    load = lambda: run.policy(step, merged=False)[1]
    adapted = has_adapters(loaded.params)
    return Checkpoint(f"{run.path}@{step}", loaded.model, adapted, loaded.tokenizer, load)


def _with_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    # That of a tied classifier's own adapters is untied.
    merge = lambda: merge_adapters(base.model, base.load())
    model = merge()[0] if base.adapted else base.model
    load = lambda: add_peft(model, merge()[1], directory)
    return Checkpoint(str(directory), model, False, base.tokenizer, load)


def _require_alike(first: Checkpoint, other: Checkpoint) -> None:
    for field in dataclasses.fields(first.model.config):
        a, b = (getattr(c.model.config, field.name) for c in (first, other))
        if field.name not in _FREE and a != b:
            raise JaxdynError(
                f"{first.name} and {other.name} are different models: {field.name} is {a} and {b}"
            )
