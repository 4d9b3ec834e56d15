"""Advantages: how much better a completion was than what one would have expected of its prompt.

Rewards come as [B] with the G generations of a prompt side by side (row p * G + g). A NaN reward
is unscorable: its advantage is 0, and no mean or standard deviation counts it. (A KL and an entropy
in the loss need no score, and count.) The smallest reward is subtracted before a mean is taken, so
that equal rewards give 0 and not what their mean rounds to.

`estimate_advantages` is the whole way from rewards to what a loss takes, by the kind of advantage:

    group_relative                (R - group mean) / (σ + ε)            GRPO and its kin   [B]
    leave_one_out                  R - mean of the group's others       RLOO               [B]
    plain                          R - batch mean                       REINFORCE          [B]
    gae                            Σ (γλ)^k δ_{t+k}, whitened           PPO                [B, C]
    reinforce_plus_plus            rewards to go, whitened              REINFORCE++        [B, C]
    reinforce_plus_plus_baseline   the same of R - group mean           its variant        [B, C]

Our reading of REINFORCE++ (Hu et al. 2025): the reward of a token is R at the last one, minus β
times the KL of the token when the KL is placed in the reward; the returns Σ_{k≥t} γ^(k-t) r_k are
whitened over all tokens of the batch; the surrogate is PPO's. Its variant with a baseline was
published with k2 in the loss.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.grammar import at_least, between, one_of
from jaxdyn.rl.aggregation import drop_truncated
from jaxdyn.rl.kl import kl_penalty
from jaxdyn.rl.losses import LOSSES, LossConfig, Scale
from jaxdyn.rl.values import generalized_advantages, token_rewards, whiten
from jaxdyn.types import JaxdynError

Kind = Literal[
    "group_relative",
    "leave_one_out",
    "plain",
    "gae",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
      kind: one of `KINDS`; that of the loss when not given.
      scale: what group_relative divides by: its group's or the batch's standard deviation, or
        nothing; the loss's own (nothing for dr_grpo, else the group's) when not given.
      epsilon: added to that standard deviation.
      gamma: discount γ of gae and reinforce_plus_plus.
      lam: λ of gae.
      whiten: give gae's advantages mean 0 and variance 1 over the batch's tokens.
      overlong_buffer: a completion this near the length limit, in tokens, loses reward; 0: never.
      overlong_weight: the reward that a completion at the limit loses.
    """

    kind: Kind | None = None
    scale: Scale | None = None
    epsilon: float = 1e-4
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    overlong_buffer: int = 0
    overlong_weight: float = 1.0

    def __post_init__(self):
        one_of((*get_args(Kind), None), self, "advantage", "kind")
        one_of((*get_args(Scale), None), self, "advantage", "scale")
        between(0, 1, self, "advantage", "gamma", "lam")
        at_least(0, self, "advantage", "epsilon", "overlong_buffer", "overlong_weight")
        if self.overlong_weight != 1 and not self.overlong_buffer:
            raise JaxdynError(
                f"advantage.overlong_weight needs advantage.overlong_buffer, which is 0; got "
                f"{self.overlong_weight}"
            )


class ScoredBatch(struct.PyTreeNode):
    """B scored completions of up to C tokens, a prompt's generations side by side.

    Attributes:
      rewards: one a completion; NaN where it could not be scored.
      finished: whether a completion ended by a stop token.
      completion_mask: all sampled tokens, those of truncated completions among them.
      old_per_token_logps: under the policy that sampled them.
      ref_per_token_logps: under the reference.
      values: the value head's estimates.
    """

    rewards: Float[Array, " B"]
    finished: Bool[Array, " B"]
    completion_mask: Bool[Array, "B C"]
    old_per_token_logps: Float[Array, "B C"] | None = None
    ref_per_token_logps: Float[Array, "B C"] | None = None
    values: Float[Array, "B C"] | None = None


class KindRow(NamedTuple):
    """Which fields of `AdvantageConfig` a kind reads, and whether it compares generations."""

    reads: frozenset[str]
    compares: bool


KINDS: dict[str, KindRow] = {
    "group_relative": KindRow(frozenset({"scale", "epsilon"}), True),
    "leave_one_out": KindRow(frozenset(), True),
    "plain": KindRow(frozenset(), False),
    "gae": KindRow(frozenset({"gamma", "lam", "whiten"}), False),
    "reinforce_plus_plus": KindRow(frozenset({"gamma"}), False),
    "reinforce_plus_plus_baseline": KindRow(frozenset({"gamma"}), True),
}


def advantage_kind(loss: LossConfig, config: AdvantageConfig) -> str:
    """The advantage's kind: as set, or the loss's own."""
    return config.kind or LOSSES[loss.loss_type].advantages[0]


def compares_generations(loss: LossConfig, config: AdvantageConfig) -> bool:
    """Whether a prompt's completions are compared, so that equal rewards move nothing."""
    return KINDS[advantage_kind(loss, config)].compares


def check_combination(
    loss: LossConfig,
    config: AdvantageConfig,
    num_generations: int,
    max_completion_length: int | None = None,
) -> None:
    """Raise `JaxdynError` for a loss, advantages and sizes that make no sense together."""
    if config.overlong_buffer and max_completion_length is not None:
        _check_buffer(config.overlong_buffer, max_completion_length)
    kind, taken = advantage_kind(loss, config), LOSSES[loss.loss_type].advantages
    if kind not in taken:
        raise JaxdynError(
            f"advantage.kind must be {' or '.join(taken)} for loss {loss.loss_type}, got {kind!r}"
        )
    others = frozenset().union(*(row.reads for row in KINDS.values())) - KINDS[kind].reads
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in others and value != field.default:
            raise JaxdynError(f"advantage.{field.name} is of no use to {kind}, got {value!r}")
    if compares_generations(loss, config) and num_generations < 2:
        raise JaxdynError(
            f"train.num_generations must be at least 2, got {num_generations}: {kind} advantages "
            "compare a prompt's completions"
        )


@functools.partial(
    jax.jit, static_argnames=("config", "loss", "num_generations", "max_completion_length")
)
def estimate_advantages(
    config: AdvantageConfig,
    loss: LossConfig,
    batch: ScoredBatch,
    num_generations: int,
    max_completion_length: int | None = None,
) -> tuple[Float[Array, " B"] | Float[Array, "B C"], Float[Array, "B C"] | None]:
    """The advantages that the loss takes and, for gae, the returns that its values should meet.

    Completions that the loss drops as truncated still count in their group's mean, but not in a
    whitening. Lengths are measured against `max_completion_length` (C when not given). The returns
    of an unscorable completion are its values, so that nothing is learnt from it.
    Raises `JaxdynError` for a KL in the reward without log-probabilities, and for gae without
    values.
    """
    rewards, completion_mask = batch.rewards, batch.completion_mask
    kind = advantage_kind(loss, config)
    if config.overlong_buffer:
        limit = completion_mask.shape[1] if max_completion_length is None else max_completion_length
        lengths = completion_mask.sum(axis=1)
        overlong = overlong_penalty(lengths, limit, config.overlong_buffer)
        rewards = rewards + config.overlong_weight * overlong
    penalty = jnp.zeros(completion_mask.shape, rewards.dtype)
    if loss.kl_placement == "reward":
        old, ref = batch.old_per_token_logps, batch.ref_per_token_logps
        if old is None or ref is None:
            raise JaxdynError("loss.kl_placement 'reward' needs old and reference log-probs")
        penalty = kl_penalty(loss.beta, loss.resolved_kl_estimator, old, ref, completion_mask)

    if kind == "group_relative":
        scale = config.scale or LOSSES[loss.loss_type].scale
        rewards = rewards - penalty.sum(axis=1)
        return group_relative(rewards, num_generations, scale, config.epsilon), None
    if kind == "leave_one_out":
        return leave_one_out(rewards - penalty.sum(axis=1), num_generations), None
    if kind == "plain":
        return plain(rewards - penalty.sum(axis=1)), None

    scored = counted = completion_mask & ~jnp.isnan(rewards)[:, None]
    if loss.mask_truncated:
        counted = drop_truncated(scored, batch.finished)
    if kind == "reinforce_plus_plus_baseline":
        rewards = group_relative(rewards, num_generations, "none")
    of_tokens = token_rewards(rewards, completion_mask) - penalty
    if kind == "gae":
        values = batch.values
        if values is None:
            raise JaxdynError("gae needs the value head's estimates, got none")
        advantages, returns = generalized_advantages(
            of_tokens, values, completion_mask, config.gamma, config.lam
        )
        advantages = whiten(advantages, counted) if config.whiten else advantages
        return jnp.where(scored, advantages, 0), jnp.where(scored, returns, values)
    worthless = jnp.zeros_like(of_tokens)
    to_go, _ = generalized_advantages(of_tokens, worthless, completion_mask, config.gamma, lam=1.0)
    return whiten(to_go, counted), None


def overlong_penalty(
    lengths: Int[Array, " B"], max_completion_length: int, buffer: int
) -> Float[Array, " B"]:
    """0 up to L_max - buffer tokens, from there falling linearly to -1 at L_max.

    Source: Yu et al. 2025 (DAPO), eq. 13. Raises `JaxdynError` for a buffer that is not between 1
    token and the whole length.
    """
    _check_buffer(buffer, max_completion_length)
    return jnp.clip((max_completion_length - buffer - lengths) / buffer, -1, 0)


def _check_buffer(buffer: int, max_completion_length: int) -> None:
    if not 0 < buffer <= max_completion_length:
        raise JaxdynError(
            f"advantage.overlong_buffer must lie between 1 and max_completion_length "
            f"({max_completion_length}), got {buffer}"
        )


def group_relative(
    rewards: Float[Array, " B"],
    num_generations: int,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
) -> Float[Array, " B"]:
    """A_i = (R_i - mean of its group) / (σ + ε), σ of its group, of the batch, or 1 without ε.

    σ is the sample standard deviation (divided by n - 1). Equal rewards in a group give 0.
    Source: Shao et al. 2024 (GRPO), eq. 3; without scaling Liu et al. 2025 (Dr. GRPO).
    Raises `JaxdynError` for fewer than 2 generations, whose advantages would all be 0.
    """
    groups, scored = _groups(rewards, num_generations)
    centred = _centred(groups, scored, axis=1)
    if scale == "group":
        centred = centred / (_std(groups, scored, axis=1) + epsilon)
    elif scale == "batch":
        centred = centred / (_std(groups, scored, axis=(0, 1)) + epsilon)
    elif scale != "none":
        raise JaxdynError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    return centred.reshape(-1)


def leave_one_out(rewards: Float[Array, " B"], num_generations: int) -> Float[Array, " B"]:
    """A_i = R_i - mean of the other rewards of its group, n / (n - 1) times R_i - group mean.

    A completion alone with a score in its group has nothing to be compared with and gets 0.
    Source: Ahmadian et al. 2024 (RLOO). Raises `JaxdynError` for fewer than 2 generations.
    """
    groups, scored = _groups(rewards, num_generations)
    count = _count(scored, axis=1)
    centred = _centred(groups, scored, axis=1)
    return (centred * count / jnp.maximum(count - 1, 1)).reshape(-1)


def plain(
    rewards: Float[Array, " B"], baseline: Literal["batch", "none"] = "batch"
) -> Float[Array, " B"]:
    """A_i = R_i - mean of the batch, or R_i itself. Source: Williams 1992 (REINFORCE)."""
    scored = ~jnp.isnan(rewards)
    if baseline == "batch":
        rewards = _centred(rewards, scored, axis=0)
    elif baseline != "none":
        raise JaxdynError(f"baseline must be 'batch' or 'none', got {baseline!r}")
    return jnp.where(scored, rewards, 0)


def _groups(
    rewards: Float[Array, " B"], num_generations: int
) -> tuple[Float[Array, "P G"], Bool[Array, "P G"]]:
    """Rewards as [P, G] and which of them are scored."""
    if num_generations < 2:
        raise JaxdynError(
            f"num_generations must be at least 2 to compare generations, got {num_generations}"
        )
    if rewards.shape[0] % num_generations:
        raise JaxdynError(
            f"{rewards.shape[0]} rewards do not divide into groups of {num_generations} generations"
        )
    groups = rewards.reshape(-1, num_generations)
    return groups, ~jnp.isnan(groups)


def _centred(x, scored, axis):
    """x less its mean over the scored; 0 where there is no score."""
    least = jnp.min(x, axis=axis, keepdims=True, where=scored, initial=jnp.inf)
    above = jnp.where(scored, x - least, 0)
    mean = above.sum(axis=axis, keepdims=True) / _count(scored, axis)
    return jnp.where(scored, above - mean, 0)


def _std(x, scored, axis):
    """Sample standard deviation; 0 where fewer than two are scored."""
    squares = jnp.sum(_centred(x, scored, axis) ** 2, axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(_count(scored, axis) - 1, 1))


def _count(scored, axis):
    """How many are scored, at least 1."""
    return jnp.maximum(scored.sum(axis=axis, keepdims=True), 1)
