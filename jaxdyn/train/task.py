"""What a run works on: a model where its arrays lie, prompts, and a reward."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp

from jaxdyn.config import Config, RewardModelConfig
from jaxdyn.data import (
    DataConfig,
    Pairs,
    Prompts,
    Tokenizer,
    fit_pairs,
    fit_prompts,
    load_source,
    load_tokenizer,
)
from jaxdyn.distributed import Layout, make_mesh, one_device, require_divisible, shard_model
from jaxdyn.models import (
    LanguageModel,
    add_adapters,
    add_sequence_head,
    load_pretrained,
    load_reward_model,
    local_directory,
    pretrained_config,
)
from jaxdyn.models.held import held
from jaxdyn.models.peft import add_peft, load_adapters, peft_directory
from jaxdyn.rewards import LEARNED, LearnedReward, RewardOutput, make_reward
from jaxdyn.rollout import step_key
from jaxdyn.sections import ModelSource
from jaxdyn.train.frozen import with_frozen
from jaxdyn.train.pmap import require_copies
from jaxdyn.train.scorer import Scorer, own_layout
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
    public data set that are of no use. `scorers` are the reward models that it names.
    """

    config: Told
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    reward: Callable[..., RewardOutput] | None = None
    metrics: Callable[..., RewardOutput] | None = None
    scorers: dict[str, Scorer] = dataclasses.field(default_factory=dict)
    overlong: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0

    def told(self, **changes: Any) -> "Task":
        """The same with sections of the configuration changed, and their metrics."""
        config = dataclasses.replace(self.config, **changes)
        scorers = learned_rewards(config, self.layout, self.scorers)
        metrics = make_metrics(config, scorers)
        return dataclasses.replace(self, config=config, metrics=metrics, scorers=scorers)

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
    if isinstance(config, RewardModelConfig):
        return open_pairs(config, loaded)
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
    scorers = learned_rewards(config, loaded.layout)
    return Task(
        **vars(loaded),
        config=config,
        train=train.prompts,
        test=test.prompts,
        overlong={"train": train.overlong, "test": test.overlong},
        left_out=sum({**train.prompts.left_out, **test.prompts.left_out}.values()),
        reward=make_reward(config.reward, scorers),
        metrics=make_metrics(config, scorers),
        scorers=scorers,
    )


def open_pairs(config: RewardModelConfig, loaded: LoadedModel) -> Task:
    """As `open_task`, of a run that learns preferences."""
    limit, context = config.train.max_length, loaded.model.config.max_positions
    if limit > context:
        raise JaxdynError(
            f"train.max_length ({limit}) exceeds the model's context of {context} tokens"
        )
    read = lambda split: Pairs(load_source(config.data, split), config.data, loaded.tokenizer)
    train, test = fit_pairs(read("train"), limit), fit_pairs(read("test"), limit)
    return Task(
        **vars(loaded),
        config=config,
        train=train.prompts,
        test=test.prompts,
        overlong={"train": train.overlong, "test": test.overlong},
        left_out=sum({**train.prompts.left_out, **test.prompts.left_out}.values()),
    )


def make_metrics(
    config: Config, scorers: Mapping[str, Scorer]
) -> Callable[..., RewardOutput] | None:
    """The evaluation's metrics, which read the reward's options and columns; None without any."""
    if not config.evaluation.metrics:
        return None
    functions = config.evaluation.metrics
    try:
        named = dataclasses.replace(config.reward, functions=functions, weights=())
        return make_reward(named, scorers)
    except JaxdynError as error:
        raise JaxdynError(f"evaluation.metrics: {error}") from error


# -- reward models ------------------------------------------------------------------------------


def learned_rewards(
    config: Config, layout: Layout, known: Mapping[str, Scorer] = {}
) -> dict[str, Scorer]:
    """The reward models that a configuration names, by their sections; `known` ones as they are."""
    named = {*config.reward.functions, *config.evaluation.metrics}
    found = {}
    for name in (name for name in LEARNED if name in named):
        options = getattr(config.reward, name)
        found[name] = known.get(name) or open_scorer(name, options, config.data, layout)
    return found


def open_scorer(name: str, options: LearnedReward, data: DataConfig, layout: Layout) -> Scorer:
    """The reward model of the section `name` of `reward`, on this process's devices.

    Raises:
      JaxdynError: if it cannot be had, is none, or does not fit its tokenizer or the mesh.
    """
    if not options.path:
        raise JaxdynError(f"reward.{name}.path must name a reward model, got ''")
    layout = own_layout(layout)
    directory = local_directory(options.path)
    shape, rows = pretrained_config(directory), options.batch_size
    require_divisible(layout.mesh, shape, rows, f"reward.{name}.batch_size")
    dtype = jnp.dtype(options.dtype).type
    model, params = load_reward_model(directory, dtype=dtype, where=layout.where)
    params = {**params, "backbone": held(params["backbone"], options.dtype)}
    tokenizer, params = open_tokenizer(directory, model), layout.place(params)
    reads = dataclasses.replace(
        data, prompt_template=options.prompt_template, chat_template_kwargs="{}"
    )
    return Scorer(name, on_mesh(model, layout), params, tokenizer, layout, options, reads)


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
    open_ = open_scoring if isinstance(config, RewardModelConfig) else open_model
    model, params, tokenizer = open_(config.model, layout)
    model, params = with_adapters(model, params, config)
    placed = layout.place(with_frozen(params, config))
    model = on_mesh(model, layout)
    return LoadedModel(model=model, params=placed, tokenizer=tokenizer, layout=layout)


def on_mesh(model: LanguageModel, layout: Layout) -> LanguageModel:
    """The model as it runs on a layout's devices."""
    platform = layout.mesh.devices.flat[0].platform
    return shard_model(model, layout.mesh) if layout.mesh.size > 1 else model.on(platform)


def open_model(
    source: ModelSource, layout: Layout | None = None
) -> tuple[LanguageModel, Params, Tokenizer]:
    """A model, its parameters as a layout has them, and its tokenizer.

    Raises:
      JaxdynError: if one of them cannot be read, or the tokenizer has ids that the model has not.
    """
    directory = local_directory(source.path)
    model, params = load_pretrained(
        directory,
        untie=source.untie,
        dtype=jnp.dtype(source.dtype).type,
        where=layout.where if layout else None,
    )
    return dataclasses.replace(model, remat=source.remat), params, open_tokenizer(directory, model)


def open_scoring(
    source: ModelSource, layout: Layout | None = None
) -> tuple[LanguageModel, Params, Tokenizer]:
    """As `open_model`, a reward model: one as it is, or a language model with a head of zeros.

    Raises:
      JaxdynError: as `open_model`, and for a reward model with a gate.
    """
    directory, dtype = local_directory(source.path), jnp.dtype(source.dtype).type
    head = pretrained_config(directory).head
    if head is None:
        model, params, tokenizer = open_model(source, layout)
        return *add_sequence_head(model, params, pad_id=tokenizer.pad_id), tokenizer
    if head.gating is not None:
        raise JaxdynError(f"{directory} weighs objectives by a gate, which is not trained here")
    model, params = load_reward_model(
        directory, dtype=dtype, where=layout.where if layout else None
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
    """The model with `model.adapter`, and with the adapters that the run trains: that one's, or
    such as are drawn from its seed and leave the function as it is.

    Raises:
      JaxdynError: if a tied model's one matrix would both move and stay, or the adapter is none of
        this model's, or not what the run trains.
    """
    body, head = config.optim.backbone, config.optim.classifier
    if model.config.tied and (body == "full") != (head == "full"):
        raise JaxdynError(
            f"optim.backbone is {body} and optim.classifier {head}, but {config.model.path} ties "
            "them in one matrix: train both in full or neither, or set model.untie"
        )
    given = config.model.adapter and peft_directory(config.model.adapter)
    if "lora" not in (body, head):
        return model, add_peft(model, params, given) if given else params
    key = step_key(config.seed, "adapters", 0)
    model, params = add_adapters(
        model, params, config.lora, key, backbone=body == "lora", classifier=head == "lora"
    )
    return model, load_adapters(model, params, given) if given else params
