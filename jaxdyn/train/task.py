"""What a run works on: a model where its arrays lie, prompts, and a reward."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp

from jaxdyn.config import Config
from jaxdyn.data import Prompts, Tokenizer, fit_prompts, load_source, load_tokenizer
from jaxdyn.distributed import Layout, make_mesh, one_device, require_divisible, shard_model
from jaxdyn.hosts import host_memory
from jaxdyn.models import (
    LanguageModel,
    add_adapters,
    load_pretrained,
    local_directory,
    pretrained_config,
)
from jaxdyn.rewards import RewardOutput, make_reward
from jaxdyn.rollout import step_key
from jaxdyn.sections import ModelSource
from jaxdyn.train.frozen import with_frozen
from jaxdyn.train.pmap import require_copies
from jaxdyn.types import JaxdynError, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model as loaded, adapters in it, its tokenizer, and the layout that it runs on."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    layout: Layout = dataclasses.field(default_factory=one_device)


Told = TypeVar("Told", bound=Config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(LoadedModel, Generic[Told]):
    """A configuration and what it names: the model, training and held-out prompts, rewards.

    `params` are where training starts; once it has begun they are the reference of the KL penalty
    alone, and nothing without one (`jaxdyn.train.frozen`). `overlong` counts the prompts of each
    split that were too long, and dropped or to be cut (`data.overlong`); `left_out`, the rows of a
    public data set that are of no use.
    """

    config: Told
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    reward: Callable[..., RewardOutput]
    metrics: Callable[..., RewardOutput] | None = None
    overlong: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0

    def told(self, **changes: Any) -> "Task":
        """The same with sections of the configuration changed, and their metrics."""
        config = dataclasses.replace(self.config, **changes)
        return dataclasses.replace(self, config=config, metrics=make_metrics(config))

    @property
    def cuts(self) -> bool:
        """Whether prompts that are too long are cut."""
        return self.config.data.overlong == "truncate-left"

    def at_temperature(self, temperature: float) -> "Task":
        """The same, sampling at another temperature."""
        sampling = dataclasses.replace(self.config.sampling, temperature=temperature)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, sampling=sampling))


def open_task(config: Told, loaded: LoadedModel | None = None) -> Task[Told]:
    """Load everything a run needs and check that it fits together.

    Args:
      loaded: the configuration's model, if it has been loaded.

    Raises:
      JaxdynError: naming what does not: the model, its vocabulary, its context, the prompts.
    """
    loaded = loaded or load_model(config)
    prompt, completion = config.train.max_prompt_length, config.sampling.max_completion_length
    if (longest := prompt + completion) > loaded.model.config.max_positions:
        raise JaxdynError(
            f"train.max_prompt_length ({prompt}) + sampling.max_completion_length ({completion}) "
            f"= {longest} exceeds the model's context of {loaded.model.config.max_positions} tokens"
        )
    read = lambda split: Prompts(load_source(config.data, split), config.data, loaded.tokenizer)
    # A supervised run encodes a row whole, of the train split alone.
    whole = loaded.model.config.max_positions if config.kind == "sft" else None
    train, test = fit_prompts(read("train"), prompt, whole), fit_prompts(read("test"), prompt)
    return Task(
        **vars(loaded),
        config=config,
        train=train.prompts,
        test=test.prompts,
        overlong={"train": train.overlong, "test": test.overlong},
        left_out=sum({**train.prompts.left_out, **test.prompts.left_out}.values()),
        reward=make_reward(config.reward),
        metrics=make_metrics(config),
    )


def make_metrics(config: Config) -> Callable[..., RewardOutput] | None:
    """The evaluation's metrics, which read the reward's options and columns; None without any."""
    if not config.evaluation.metrics:
        return None
    functions = config.evaluation.metrics
    try:
        return make_reward(dataclasses.replace(config.reward, functions=functions, weights=()))
    except JaxdynError as error:
        raise JaxdynError(f"evaluation.metrics: {error}") from error


# -- the model ------------------------------------------------------------------------------------


def load_model(config: Config) -> LoadedModel:
    """The configuration's model with the adapters it trains, on its mesh.

    Raises:
      JaxdynError: if the mesh, the model or the tokenizer cannot be had, or do not fit each other.
    """
    if not config.model.path:
        raise JaxdynError(
            "model.path names no model: give --model.path, a Hugging Face directory or a hub name"
        )
    layout = Layout(make_mesh(config.mesh))
    shape = pretrained_config(local_directory(config.model.path))
    require_divisible(layout.mesh, shape, config.train.num_prompts, "train.num_prompts")
    if config.copied:
        require_copies(layout.mesh)
    with host_memory() if layout.mesh.size > 1 else contextlib.nullcontext():
        model, params, tokenizer = open_model(config.model)
        model, params = with_adapters(model, params, config)
        params = with_frozen(params, config)
    platform = layout.mesh.devices.flat[0].platform
    model = shard_model(model, layout.mesh) if layout.mesh.size > 1 else model.on(platform)
    placed = layout.place(params)
    return LoadedModel(model=model, params=placed, tokenizer=tokenizer, layout=layout)


def open_model(source: ModelSource) -> tuple[LanguageModel, Params, Tokenizer]:
    """A model, its parameters and its tokenizer.

    Raises:
      JaxdynError: if one of them cannot be read, or the tokenizer has ids that the model has not.
    """
    directory = local_directory(source.path)
    model, params = load_pretrained(
        directory, untie=source.untie, dtype=jnp.dtype(source.dtype).type
    )
    return dataclasses.replace(model, remat=source.remat), params, open_tokenizer(directory, model)


def open_tokenizer(directory: Path, model: LanguageModel) -> Tokenizer:
    """The tokenizer in a model's directory.

    Raises:
      JaxdynError: if it cannot be read, or has ids that the model has not.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise JaxdynError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocabulary of {model.config.vocab_size}"
        )
    if tokenizer.largest_id >= model.config.vocab_size:
        raise JaxdynError(
            f"the tokenizer in {directory} has a token of the id {tokenizer.largest_id}, outside "
            f"the model's vocabulary of {model.config.vocab_size}"
        )
    outside = [i for i in (tokenizer.pad_id, *tokenizer.stop_ids) if i >= model.config.vocab_size]
    if outside:
        raise JaxdynError(
            f"{directory} names {outside[0]} as a padding or stop token, outside the model's "
            f"vocabulary of {model.config.vocab_size}"
        )
    return tokenizer


def with_adapters(
    model: LanguageModel, params: Params, config: Config
) -> tuple[LanguageModel, Params]:
    """The same function with the adapters that the run trains, drawn from its seed.

    Raises:
      JaxdynError: if a tied model's one matrix would both move and stay.
    """
    body, head = config.optim.backbone, config.optim.classifier
    if model.config.tied and (body == "full") != (head == "full"):
        raise JaxdynError(
            f"optim.backbone is {body} and optim.classifier {head}, but {config.model.path} ties "
            "them in one matrix: train both in full or neither, or set model.untie"
        )
    if "lora" not in (body, head):
        return model, params
    key = step_key(config.seed, "adapters", 0)
    return add_adapters(
        model, params, config.lora, key, backbone=body == "lora", classifier=head == "lora"
    )
