"""A run's model as a Hugging Face directory."""

from pathlib import Path

import jax

from jaxdyn.config import SFTConfig
from jaxdyn.data import Tokenizer
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel, merge_adapters, save_pretrained
from jaxdyn.paths import AnyPath, in_bucket
from jaxdyn.train.loop import run
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


def export(path: AnyPath, output: AnyPath, step: Which = None) -> AnyPath:
    """Write a checkpoint of a run (the newest), adapters merged and without its value head.

    Raises:
      JaxdynError: if there is no such run or checkpoint, or `output` is a bucket or not empty.
    """
    if in_bucket(output):
        raise JaxdynError(f"a model is written on disk, got {output}")
    with open_run(path) as run:
        step = run.find(step)
        if output.exists() and any(output.iterdir()):
            raise JaxdynError(f"{output} is not empty; choose another output")
        save_policy(output, *run.policy(step), run.loaded.tokenizer)
    return output


def run_sft(config: SFTConfig, progress: Progress | None = None) -> AnyPath:
    """Run, or resume, supervised training; leave the model in `OUTPUT/model` and return that."""

    def leave(task: Task, state: TrainState, directory: RunDirectory) -> None:
        model, params = merge_adapters(task.model, policy_of(state.params))
        save_policy(directory.local / "model", model, params, task.tokenizer)

    return run(config, progress, leave) / "model"
