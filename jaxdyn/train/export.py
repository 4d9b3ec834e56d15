"""A run's model as a Hugging Face directory."""

from pathlib import Path

import jax

from jaxdyn.config import RewardModelConfig, SFTConfig
from jaxdyn.data import Tokenizer
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel, merge_adapters, save_pretrained
from jaxdyn.paths import AnyPath, in_bucket, open_path
from jaxdyn.train import loop
from jaxdyn.train.probe import policy_of
from jaxdyn.train.progress import Progress
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.saved import Which, open_run
from jaxdyn.train.state import TrainState
from jaxdyn.train.task import Task
from jaxdyn.types import JaxdynError, Params


def save_policy(
    directory: Path, model: LanguageModel, params: Params, tokenizer: Tokenizer
) -> None:
    """Write model and tokenizer; of many processes the first does."""
    host = fetch(params)
    if jax.process_index() == 0:
        save_pretrained(directory, model, host, stop_ids=tokenizer.stop_ids)
        tokenizer.save(directory)


def export(run: str | AnyPath, output: str | AnyPath, step: Which = None) -> AnyPath:
    """Write a checkpoint of a run (the newest), adapters merged and without its value head.

    Raises:
      JaxdynError: if there is no such run or checkpoint, or `output` is a bucket or not empty.
    """
    where = open_path(output)
    if in_bucket(where):
        raise JaxdynError(f"a model is written on disk, got {where}")
    with open_run(run) as saved:
        step = saved.find(step)
        if where.exists() and any(where.iterdir()):
            raise JaxdynError(f"{where} is not empty; choose another output")
        save_policy(where, *saved.policy(step), saved.loaded.tokenizer)
    return where


def run_to_model(
    config: SFTConfig | RewardModelConfig, progress: Progress | None = None
) -> AnyPath:
    """Run, or resume, a training that leaves its model in `OUTPUT/model`, and return that."""

    def leave(task: Task, state: TrainState, directory: RunDirectory) -> None:
        model, params = merge_adapters(task.model, policy_of(state.params))
        save_policy(directory.local / "model", model, params, task.tokenizer)

    return loop.run(config, progress, leave) / "model"
