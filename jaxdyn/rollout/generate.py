"""Prefill once a prompt, then decode its G generations with a KV cache, in one jitted program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxdyn.grammar import MOST_TOKENS, at_least, between
from jaxdyn.rollout.sampling import sample_within
from jaxdyn.types import JaxdynError, Model, Params, PromptBatch, Rollout, Support

SMALLEST_CACHE = 64


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
      max_completion_length: longest completion, in tokens, the stop token included.
      temperature: divides the logits; 0 is greedy.
      top_k: draw from the k likeliest tokens only; 0 is off.
      top_p: draw from the likeliest tokens that hold this share of the mass only; 1 is off.
      min_p: draw only tokens at least this share as likely as the likeliest; 0 is off.
      stop: texts that end a completion, beside the stop tokens; they are no part of its text. What
        is sampled after one is thrown away, so they save no time.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        at_least(1, self, "sampling", "max_completion_length", most=MOST_TOKENS)
        at_least(0, self, "sampling", "temperature", "top_k")
        between(0, 1, self, "sampling", "top_p", ends="(]")
        between(0, 1, self, "sampling", "min_p")
        if "" in self.stop:
            raise JaxdynError(f"sampling.stop must be non-empty texts, got {self.stop}")

    @property
    def drawing(self) -> dict[str, Any]:
        """What `generate` is told of it: all but the stop strings, which need texts."""
        return {name: value for name, value in vars(self).items() if name != "stop"}


def generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: PRNGKeyArray,
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    harvest: bool = False,
    support: bool = False,
) -> Rollout:
    """Sample G completions of up to C tokens for each of P left-padded prompts.

    A completion ends with the first of `stop_ids`, which belongs to it and to its mask; after it
    come `pad_id`s. Decoding ends when every completion has. `harvest` keeps the features that
    predicted the tokens, those of a teacher-forced pass (`Rollout.features`), and `support` which
    tokens the filters left. Only a new model, shape, number of stop ids, `harvest` or `support`
    compiles: key, temperature, top-k, top-p, min-p, stop
    and pad ids are traced.

    Fold the step into `key` (`step_key`). Raises `JaxdynError` when S + C slots exceed
    the model's positions.
    """
    slots = prompts.prompt_ids.shape[1] + max_completion_length
    if slots > model.config.max_positions:
        raise JaxdynError(
            f"prompts of {prompts.prompt_ids.shape[1]} slots and completions of "
            f"{max_completion_length} exceed the model's context of {model.config.max_positions}"
        )
    static = model, num_generations, max_completion_length, harvest, support
    filters = np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p)
    ends = np.asarray(stop_ids, np.int32), np.int32(pad_id)
    return _generate(*static, params, prompts, key, filters, ends)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
@jax.named_scope("rollout")
def _generate(model, generations, length, harvest, support, params, prompts, key, filters, ends):
    # Rounded once, not at every token.
    view, (stop_ids, pad_id) = model.rounded(model.view(params)), ends
    per_generation = lambda x: jnp.repeat(x, generations, axis=0)
    prompt_ids, prompt_mask = map(per_generation, (prompts.prompt_ids, prompts.prompt_mask))
    prompt_length = prompt_mask.sum(axis=1, dtype=jnp.int32)
    rows = len(prompt_ids)

    # The prompts' cache is read by all their generations; each has one for its own tokens, which
    # grows with them, since a step reads all of it.
    with jax.named_scope("prefill"):
        prompt_features, prompt_cache = model.prefill(
            view["backbone"], prompts.prompt_ids, prompts.prompt_mask
        )
    own = lambda x: jnp.zeros((x.shape[0], rows, x.shape[2], 0, x.shape[4]), x.dtype)

    def draw(state, features):
        """Sample token t of every completion from the features that predict it, and record it."""
        t, cache, _, alive, ids, mask, logps, kept, left = state
        logits = model.logits(view["classifier"], features)
        drawn = sample_within(jax.random.fold_in(key, t), logits, *filters)
        token, logp, within, log_mass = drawn
        token = jnp.where(alive, token, pad_id)
        column = lambda array, x: jax.lax.dynamic_update_index_in_dim(array, x, t, axis=1)
        ids, mask = column(ids, token), column(mask, alive)
        logps = column(logps, jnp.where(alive, logp, 0))
        if harvest:
            kept = column(kept, jnp.where(alive[:, None], features, 0))
        if support:
            bits = jnp.packbits(within, axis=-1, bitorder="little")
            left = Support(column(left.bits, bits), column(left.log_mass, log_mass))
        stopped = (token[:, None] == stop_ids[None, :]).any(axis=1)
        return t + 1, cache, token, alive & ~stopped, ids, mask, logps, kept, left

    def unfinished(state):
        """Whether another token is wanted, and the cache has a slot for the one before it."""
        t, cache, _, alive, *_ = state
        return (t < length) & (t <= cache.keys.shape[3]) & alive.any()

    @jax.named_scope("decode")
    def advance(state):
        """Write token t - 1 to its cache slot, then draw token t from its features."""
        t, cache, token, *rest = state
        slot, slots = t - 1, cache.keys.shape[3]
        written = jnp.broadcast_to(jnp.arange(slots) <= slot, (rows, slots))
        features, cache = model.decode(
            view["backbone"],
            token,
            prompt_length + slot,
            prompt_cache,
            cache,
            jnp.concatenate([prompt_mask, written], axis=1),
            slot,
        )
        return draw((t, cache, token, *rest), features)

    first = per_generation(prompt_features[:, -1])
    wide = jnp.promote_types(first.dtype, jnp.float32)
    empty = (
        jnp.int32(0),
        jax.tree.map(own, prompt_cache),
        jnp.zeros(rows, jnp.int32),
        jnp.ones(rows, bool),
        jnp.full((rows, length), pad_id),
        jnp.zeros((rows, length), bool),
        jnp.zeros((rows, length), wide),
        jnp.zeros((rows, length, first.shape[1]), first.dtype) if harvest else None,
        Support(
            jnp.zeros((rows, length, -(-model.config.vocab_size // 8)), jnp.uint8),
            jnp.zeros((rows, length), wide),
        )
        if support
        else None,
    )
    state = draw(empty, first)
    for slots in cache_sizes(length):
        t, cache, *rest = state
        spare = [
            (0, slots - size if axis == 3 else 0) for axis, size in enumerate(cache.keys.shape)
        ]
        cache = jax.tree.map(lambda x, spare=spare: jnp.pad(x, spare), cache)
        state = jax.lax.while_loop(unfinished, advance, (t, cache, *rest))
    *_, ids, mask, logps, kept, left = state
    return Rollout(prompt_ids, prompt_mask, ids, mask, logps, kept, left)


def cache_sizes(length: int) -> list[int]:
    """The slots that a completion's cache has one after another: up to four steps of 64 or more.

    Each is a loop of its own in the compiled program. The last token needs no slot.
    """
    step = max(SMALLEST_CACHE, -(-length // 4))
    return [*range(step, length, step), length]
