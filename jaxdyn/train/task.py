"""What a run works on: a model, prompts, and a reward; and one batch of experience of it."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import ModelSource, RunConfig, SFTConfig
from jaxdyn.data import (
    Tokenizer,
    columns,
    decode_completions,
    encode_prompts,
    load_source,
    load_tokenizer,
    require_prompts_fit,
)
from jaxdyn.distributed import Layout, make_mesh, one_device, require_divisible, shard_model
from jaxdyn.dynamics.diversity import diversity_metrics
from jaxdyn.hosts import gather, host_memory, share_of, whole
from jaxdyn.models import (
    LanguageModel,
    add_adapters,
    load_pretrained,
    local_directory,
    pretrained_config,
)
from jaxdyn.rewards import RewardOutput, make_reward
from jaxdyn.rollout import generate, step_key
from jaxdyn.train.pmap import require_copies
from jaxdyn.types import JaxdynError, Params, Rollout


@dataclasses.dataclass(frozen=True)
class Task:
    """A model as loaded, its tokenizer, training and held-out prompts, the reward and metrics.

    `layout` says where its arrays lie; the model is one that runs there.
    """

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    reward: Callable[..., RewardOutput]
    metrics: Callable[..., RewardOutput] | None = None
    layout: Layout = dataclasses.field(default_factory=one_device)


def open_model(source: ModelSource) -> tuple[LanguageModel, Params, Tokenizer]:
    """A model, its parameters and its tokenizer.

    Raises:
      JaxdynError: if one of them cannot be read, or the tokenizer has ids that the model has not.
    """
    directory = local_directory(source.path)
    model, params = load_pretrained(
        directory, untie=source.untie, dtype=jnp.dtype(source.dtype).type
    )
    model = dataclasses.replace(model, remat=source.remat)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise JaxdynError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocabulary of {model.config.vocab_size}"
        )
    outside = [i for i in (tokenizer.pad_id, *tokenizer.stop_ids) if i >= model.config.vocab_size]
    if outside:
        raise JaxdynError(
            f"{directory} names {outside[0]} as a padding or stop token, outside the model's "
            f"vocabulary of {model.config.vocab_size}"
        )
    return model, params, tokenizer


def with_adapters(
    model: LanguageModel, params: Params, config: RunConfig
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


def open_task(config: RunConfig | SFTConfig, max_prompt_length: int) -> Task:
    """Load everything a run needs, adapters among it, and check that it fits together.

    Raises:
      JaxdynError: naming what does not: the model, its vocabulary, its context, the prompts.
    """
    layout = Layout(make_mesh(config.mesh))
    shape = pretrained_config(local_directory(config.model.path))
    require_divisible(layout.mesh, shape, *batch_of(config))
    if isinstance(config, RunConfig) and config.train.update == "pmap":
        require_copies(layout.mesh)
    with host_memory() if layout.mesh.size > 1 else contextlib.nullcontext():
        model, params, tokenizer = open_model(config.model)
        if isinstance(config, RunConfig):
            model, params = with_adapters(model, params, config)
    if layout.mesh.size > 1:
        model = shard_model(model, layout.mesh)
    longest = max_prompt_length + config.sampling.max_completion_length
    if longest > model.config.max_positions:
        raise JaxdynError(
            f"max_prompt_length ({max_prompt_length}) + sampling.max_completion_length "
            f"({config.sampling.max_completion_length}) = {longest} exceeds the model's context "
            f"of {model.config.max_positions} tokens"
        )
    train, test = load_source(config.data, "train"), load_source(config.data, "test")
    for split in (train, test):
        require_prompts_fit(tokenizer, split, max_prompt_length)
    metrics = make_metrics(config)
    reward, params = make_reward(config.reward), layout.place(params)
    return Task(model, params, tokenizer, train, test, reward, metrics, layout)


def batch_of(config: RunConfig | SFTConfig) -> tuple[int, str]:
    """How many rows of a step the mesh divides, and what they are called."""
    if isinstance(config, RunConfig):
        return config.train.num_prompts, "train.num_prompts"
    return config.batch_size, "batch_size"


def make_metrics(config: RunConfig | SFTConfig) -> Callable[..., RewardOutput] | None:
    """The evaluation's metrics, which read the reward's options and columns; None without any."""
    if not config.evaluation.metrics:
        return None
    functions = config.evaluation.metrics
    try:
        return make_reward(dataclasses.replace(config.reward, functions=functions, weights=()))
    except JaxdynError as error:
        raise JaxdynError(f"evaluation.metrics: {error}") from error


@dataclasses.dataclass(frozen=True)
class Experience:
    """A rollout with its texts and rewards: B = P * G rows, a prompt's generations together."""

    rollout: Rollout
    prompts: list[str]
    completions: list[str]
    finished: list[bool]
    completion_ids: list[list[int]]
    columns: dict[str, list]
    rewards: RewardOutput
    num_generations: int
    reward_seconds: float

    def groups(self) -> list[list[list[int]]]:
        """Completion token ids by prompt and generation."""
        rows, g = self.completion_ids, self.num_generations
        return [rows[i : i + g] for i in range(0, len(rows), g)]

    def records(self, step: int, limit: int | None = None) -> list[dict[str, Any]]:
        """The completions in readable form."""
        rows = range(len(self.completions))[:limit]
        return [
            {
                "step": step,
                "prompt_index": row // self.num_generations,
                "prompt": self.prompts[row],
                "completion": self.completions[row],
                "reward": float(self.rewards.total[row]),
                "finished": bool(self.finished[row]),
            }
            for row in rows
        ]


def gather_experience(
    task: Task,
    view: Params,
    examples: Sequence[dict[str, Any]],
    key: jax.Array,
    config: RunConfig | SFTConfig,
    num_generations: int,
    max_prompt_length: int,
    harvest: bool = False,
) -> Experience:
    """Sample `num_generations` completions of each example's prompt and score them.

    `harvest` keeps the features that predicted the tokens (`Rollout.features`).
    """
    tokenizer, sampling = task.tokenizer, config.sampling
    prompts = encode_prompts(tokenizer, [e["prompt"] for e in examples], max_prompt_length)
    rollout = generate(
        task.model,
        view,
        task.layout.rows(prompts),
        task.layout.everywhere(key),
        num_generations=num_generations,
        max_completion_length=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        harvest=harvest,
    )
    here = whole(dataclasses.replace(rollout, features=None))
    rollout = dataclasses.replace(here, features=rollout.features)
    texts, finished, ids = decode_completions(
        tokenizer, rollout.completion_ids, rollout.completion_mask
    )
    repeated = [example for example in examples for _ in range(num_generations)]
    table = columns(repeated)
    asked = table.pop("prompt")
    table.pop("completion", None)
    table |= {"finished": finished, "completion_ids": ids}
    began = time.perf_counter()
    rewards = score(task.reward, asked, texts, table)
    seconds = time.perf_counter() - began
    return Experience(
        rollout, asked, texts, finished, ids, table, rewards, num_generations, seconds
    )


def score(
    reward: Callable[..., RewardOutput],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
) -> RewardOutput:
    """The rewards of all completions, of which each process scores its share."""
    if jax.process_count() == 1:
        return reward(prompts, completions, columns)
    mine = share_of(len(completions))
    part = {name: column[mine] for name, column in columns.items()}
    scored = reward(prompts[mine], completions[mine], part)
    values = {name: gather(value, len(completions)) for name, value in scored.values.items()}
    return RewardOutput(gather(scored.total, len(completions)), values)


def experience_metrics(experience: Experience, vocab_size: int) -> dict[str, float]:
    """Reward, length and diversity of a batch of experience, under the peers' names."""
    total = experience.rewards.total
    groups = total.reshape(-1, experience.num_generations)
    spread = np.std(groups, axis=1, ddof=1) if groups.shape[1] > 1 else np.zeros(len(groups))
    lengths = np.array([len(ids) for ids in experience.completion_ids])
    metrics = {
        "reward": float(total.mean()),
        "reward_std": float(np.mean(spread)),
        "frac_reward_zero_std": float(np.mean(spread < 1e-8)),
    }
    metrics |= {f"rewards/{n}/mean": mean for n, mean in experience.rewards.means.items()}
    metrics |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": 1 - float(np.mean(experience.finished)),
    }
    diversity = diversity_metrics(experience.groups(), vocab_size)
    return metrics | {f"diversity/{k}": v for k, v in diversity.items()}
