"""What a run's stages hold in memory, by counting alone: shapes, and no compilation.

What is stored is exact. Beside it an update has its gradient, and what its forward pass keeps for
the backward pass, which is counted as if every sequence had all its slots:

    full    a layer's input                                        D a slot and layer
    dots    and its projections but the last                       + queries, keys, values, …

together with one layer's attention weights (scores, probabilities and their cotangents), and the
logits' chunks. `jaxdyn plan` compiles, and knows what a compiler makes of it.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdyn.config import Config, RewardModelConfig, RunConfig
from jaxdyn.models import LanguageModel, ModelConfig
from jaxdyn.models.held import held
from jaxdyn.optim import StageName, make_optimizer, trainable
from jaxdyn.plan.chips import CHIPS, Chip

ROOM = 0.9
"""The share of a chip's memory that a program may fill."""
COUNTS = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 2**26
"""Bytes of logits at a time (`jaxdyn.rl.vocabulary`)."""


class Need(NamedTuple):
    """Bytes of a stage: what is stored, by role, and what it takes beside."""

    stage: str
    stored: dict[str, int]
    gradient: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        return sum(self.stored.values()) + self.gradient + self.activations


def needs(shape: ModelConfig, config: Config, scorer: ModelConfig | None = None) -> list[Need]:
    """The stages of a run of `config` on a model of `shape`, in their order.

    Args:
      scorer: the shape of the reward model, of a run that is rewarded by one.
    """
    shape = dataclasses.replace(shape, tied=shape.tied and not config.model.untie)
    sequences = Sequences(shape, config)
    joint = stored(shape, config, "joint")
    beside: dict[str, int] = {}
    if isinstance(config, RunConfig):
        if config.loss.beta:
            beside["reference"] = held_size(shape, config.model.frozen_dtype)
        if scorer is not None:
            beside["reward model"] = held_size(scorer, config.reward.model.dtype)
    if not isinstance(config, RunConfig):
        name = "pairs" if isinstance(config, RewardModelConfig) else "supervised"
        return [Need(name, joint, gradient(shape, config, "joint"), sequences.activations)]
    found = [Need("rollout", {**joint, **beside, "cache": sequences.cache})]
    if not shape.tied:
        kept = sequences.features + sequences.logits
        one = stored(shape, config, "classifier")
        found.append(
            Need("stage 1", {**one, **beside}, gradient(shape, config, "classifier"), kept)
        )
    whole = gradient(shape, config, "joint")
    return [*found, Need("stage 2", {**joint, **beside}, whole, sequences.activations)]


# -- what is stored -----------------------------------------------------------------------------


@functools.cache
def parameters(shape: ModelConfig) -> Any:
    """The shapes of a model's parameters."""
    return jax.eval_shape(LanguageModel(shape).init, jax.random.key(0))


def held_size(shape: ModelConfig, dtype: str) -> int:
    """Bytes of a model that never moves."""
    return size(jax.eval_shape(lambda params: held(params, dtype), parameters(shape)))


def size(tree: Any) -> int:
    """Bytes of arrays or their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def stored(shape: ModelConfig, config: Config, stage: StageName) -> dict[str, int]:
    """Parameters, and the optimizer's state in a stage, with a tied model's two tables."""
    params = parameters(shape)
    moving, _ = trainable(config.optim, stage, params)
    state = size(jax.eval_shape(make_optimizer(config.optim).init, moving))
    tables = 2 * size(params["backbone"]["embed"]) if shape.tied else 0
    return {"parameters": size(params), "optimizer": state + tables}


def gradient(shape: ModelConfig, config: Config, stage: StageName) -> int:
    """Of all that moves; a shared matrix has one by each path."""
    params = parameters(shape)
    moving, _ = trainable(config.optim, stage, params)
    twice = size(params["backbone"]["embed"]) if shape.tied and stage == "joint" else 0
    return size(moving) + twice


# -- what comes and goes ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A step's sequences, as far as they take memory."""

    shape: ModelConfig
    config: Config

    @property
    def rows(self) -> int:
        """Sequences in memory at a time: a microbatch's; of pairs there are two each."""
        train = self.config.train
        each = 2 if isinstance(self.config, RewardModelConfig) else 1
        return each * train.sequences // train.microbatches

    @property
    def slots(self) -> int:
        """Of a prompt and its completion."""
        if isinstance(self.config, RewardModelConfig):
            return self.config.train.longest
        return self.config.train.max_prompt_length + self.config.sampling.max_completion_length

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.config.model.dtype).itemsize

    @property
    def cache(self) -> int:
        """Keys and values: of each prompt once, and of each completion."""
        config, c = self.config, self.shape
        slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.width
        prompts = config.train.num_prompts * config.train.max_prompt_length
        return slot * (prompts + config.train.sequences * config.sampling.max_completion_length)

    @property
    def features(self) -> int:
        """φ of a whole batch's completions, which stage 1 is given."""
        slots = self.config.train.sequences * self.config.sampling.max_completion_length
        return slots * self.shape.width * self.width

    @property
    def logits(self) -> int:
        """Logits in float32 and their cotangents; a head that scores has none."""
        if self.shape.head is not None:
            return 0
        return 2 * min(4 * self.rows * self.slots * self.shape.vocab_size, CHUNK)

    @property
    def kept(self) -> int:
        """What a layer keeps of a slot, in numbers (module docstring)."""
        c = self.shape
        if self.config.model.remat == "full":
            return c.width
        projected = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        # What the MLP reads has to be known again, unless it stands beside attention.
        out = 0 if c.parallel_residual else c.width
        return c.width + projected + out + (1 + c.gated_mlp) * c.mlp_width

    @property
    def activations(self) -> int:
        """Of a microbatch's forward and backward pass."""
        c, slots = self.shape, self.rows * self.slots
        layers = slots * c.num_layers * self.kept * self.width
        attention = 3 * self.rows * c.num_heads * self.slots**2 * max(self.width, 4)
        return layers + attention + self.logits


# -- the hardware that suffices -----------------------------------------------------------------


def least(shape: ModelConfig, config: Config, found: list[Need], chip: Chip) -> int | None:
    """The least chips that hold all stages and divide the step's prompts; None if 64 are too few.

    Everything is divided among them, but for a layer and the classifier, which are gathered.
    """
    matrices = size(parameters(shape)["backbone"]["layers"]) // 4
    gathered = (matrices // shape.num_layers + shape.outputs * shape.width) * (
        jnp.dtype(config.model.dtype).itemsize
    )
    most = max(need.peak for need in found)
    for count in COUNTS:
        beside = gathered if count > 1 else 0
        if config.train.num_prompts % count == 0 and most / count + beside <= ROOM * chip.hbm:
            return count
    return None


def hardware(shape: ModelConfig, config: Config, found: list[Need]) -> dict[str, int | None]:
    """Chips by their kind."""
    return {name: least(shape, config, found, CHIPS[name]) for name in ("h100", "v5p", "v5e")}
