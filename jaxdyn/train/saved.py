"""A saved run: its configuration, its checkpoints, and what they hold.

with open_run("runs/mine") as run:
    model, params = run.policy(run.steps[-1])
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import cached_property
from os import PathLike
from typing import Literal, NamedTuple

from jaxdyn.config import KINDS, Config
from jaxdyn.distributed import make_mesh
from jaxdyn.grammar import load_config
from jaxdyn.models import LanguageModel, merge_adapters
from jaxdyn.optim import Stage, stage_at
from jaxdyn.sections import MeshConfig
from jaxdyn.storage.paths import AnyPath, is_directory, open_path
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.loop import STEPS, begin_or_resume, plan_of
from jaxdyn.train.probe import policy_of, remember
from jaxdyn.train.state import TrainState, begin_stage
from jaxdyn.train.step import Taken
from jaxdyn.train.task import LoadedModel, Task, load_model, open_task
from jaxdyn.types import JaxdynError, Params

Which = int | Literal["best"] | None
"""A checkpoint: its step, the best of `train.keep_best`, or the newest."""


class Update(NamedTuple):
    """An update taken again: the parameters before it, and the step that was taken."""

    before: Params
    taken: Taken


class SavedRun:
    """A run of `jaxdyn rl` or `jaxdyn sft` with at least one checkpoint; see `open_run`.

    Attributes:
      path: its directory.
      config: what it was told, on a mesh that this machine has.
      plan: its stages.
      steps: those with a checkpoint, ascending. Checkpoint n holds what step n begins with.
    """

    def __init__(self, path: AnyPath, config: Config, checkpoints: Checkpoints):
        self.path, self.config, self.plan = path, config, plan_of(config)
        self.steps = checkpoints.steps()
        self._checkpoints = checkpoints

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model that training started from, with the adapters it trains, and the tokenizer."""
        return load_model(self.config)

    @cached_property
    def task(self) -> Task:
        """All that the run works on; this alone imports the rewards that it names."""
        return open_task(self.config, self.loaded)

    def find(self, step: Which = None) -> int:
        """The step that is meant by its number, "best", or None: the newest.

        Raises:
          JaxdynError: if it has no checkpoint.
        """
        return self._checkpoints.find(step)

    def state(self, step: Which = None) -> TrainState:
        """Parameters as stored, a value head among them, and the optimizer's state."""
        return begin_or_resume(self.loaded, self.config, self._checkpoints, self.find(step))[0]

    def policy(self, step: Which = None, merged: bool = True) -> tuple[LanguageModel, Params]:
        """The model and its stored parameters, adapters merged into the weights or beside them."""
        model, params = self.loaded.model, policy_of(self.state(step).params)
        return merge_adapters(model, params) if merged else (model, params)

    def follows(self, step: int) -> bool:
        """Whether training took a step, or would have, after a checkpoint."""
        return step < self.plan[-1].end and not self._checkpoints.position(step).get("reached")

    def take(self, step: int) -> Update:
        """Take again the update that follows a checkpoint: what training did there, bit for bit.

        Raises:
          JaxdynError: if no step follows it, or it has no checkpoint.
        """
        stage, state = self.begin(step)
        before = remember(state)
        return Update(before, STEPS[self.config.kind](self.task, state, stage, step))

    def begin(self, step: int) -> tuple[Stage, TrainState]:
        """The stage of the step that follows a checkpoint, and the state with which it begins.

        Raises:
          JaxdynError: as `take`.
        """
        stage, state = stage_at(self.plan, step), self.state(step)
        if step == stage.start > 0:
            state = begin_stage(self.loaded.layout, self.config.optim, stage, state)
        return stage, state


def require_policy(run: SavedRun) -> None:
    """JaxdynError for a run that trains a reward model: it predicts no token."""
    if run.config.kind == "reward":
        raise JaxdynError(f"{run.path} is a run of jaxdyn reward: it has no policy")


@contextlib.contextmanager
def open_run(path: str | PathLike) -> Iterator[SavedRun]:
    """Open a run's directory, on the run's own mesh or, where that does not fit, on this machine's.

    Imports no code that the run names, unless its `task` is asked for.

    Raises:
      JaxdynError: if the directory holds no run, or a run without a whole checkpoint.
    """
    directory = open_path(path)
    if not is_directory(directory) or not (directory / "config.json").exists():
        raise JaxdynError(f"{directory} holds no run: it has no config.json")
    config = load_config(KINDS, directory / "config.json")
    try:
        make_mesh(config.mesh)
    except JaxdynError:
        config = dataclasses.replace(config, mesh=MeshConfig())
    unbegun = JaxdynError(f"{directory} has no whole checkpoint yet; start the run again to go on")
    if not (directory / "checkpoints").exists():
        raise unbegun
    with Checkpoints(directory / "checkpoints", metric=config.train.keep_best) as checkpoints:
        if not checkpoints.steps():
            raise unbegun
        yield SavedRun(directory, config, checkpoints)
