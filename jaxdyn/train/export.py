"""A run's model as a Hugging Face directory."""

from pathlib import Path

import jax

from jaxdyn.config import Config, RewardModelConfig, SFTConfig
from jaxdyn.data import Tokenizer
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel, merge_adapters, save_pretrained
from jaxdyn.models.peft import save_adapters
from jaxdyn.storage.files import require_writable, whole_directory
from jaxdyn.storage.paths import AnyPath, in_bucket, open_path
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
    """Write model and tokenizer, a directory that is there whole; of many processes the first does.

    What the directory held before is replaced.
    """
    host = fetch(params)
    if jax.process_index() == 0:
        with whole_directory(directory, sum(x.nbytes for x in jax.tree.leaves(host))) as unfinished:
            save_pretrained(unfinished, model, host, stop_ids=tokenizer.stop_ids)
            tokenizer.save(unfinished)


def export(
    run: str | AnyPath, output: str | AnyPath, step: Which = None, adapter: bool = False
) -> AnyPath:
    """Write a checkpoint of a run (the newest), adapters merged and without its value head.

    Args:
      adapter: write the adapters alone instead, as PEFT reads them.

    Raises:
      JaxdynError: if there is no such run or checkpoint, or `output` is a bucket or not empty; and
        if a run moved anything but adapters and those alone are wanted.
    """
    where = open_path(output)
    if in_bucket(where):
        raise JaxdynError(f"a model is written on disk, got {where}")
    if where.exists() and not where.is_dir():
        raise JaxdynError(f"{where} is not a directory; choose another output")
    with open_run(run) as saved:
        step = saved.find(step)
        if where.exists() and any(where.iterdir()):
            raise JaxdynError(f"{where} is not empty; choose another output")
        require_writable(where.parent)
        if adapter:
            require_adapters_alone(saved.config)
            model, params = saved.policy(step, merged=False)
            host = fetch(params)
            if jax.process_index() == 0:
                save_adapters(Path(where), model, host, saved.config.model.path)
            return where
        save_policy(where, *saved.policy(step), saved.loaded.tokenizer)
    return where


def require_adapters_alone(config: Config) -> None:
    """That a run's adapters are all that it moved; JaxdynError if not."""
    modes = {name: getattr(config.optim, name) for name in ("backbone", "classifier")}
    if "full" in modes.values() or "lora" not in modes.values():
        raise JaxdynError(
            f"the run moved optim.backbone {modes['backbone']} and optim.classifier "
            f"{modes['classifier']}, which is no adapter; export it without --adapter"
        )


def run_to_model(
    config: SFTConfig | RewardModelConfig, progress: Progress | None = None
) -> AnyPath:
    """Run, or resume, a training that leaves its model in `OUTPUT/model`, and return that."""

    def leave(task: Task, state: TrainState, directory: RunDirectory) -> None:
        model, params = merge_adapters(task.model, policy_of(state.params))
        save_policy(directory.local / "model", model, params, task.tokenizer)

    return loop.run(config, progress, leave) / "model"
