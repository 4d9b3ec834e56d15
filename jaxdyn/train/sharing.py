"""One pass over a prompt for all of its completions, or for some of them at a time.

    P rows of S + G C slots   instead of   P G rows of S + C slots

Both give the same features, and the same gradients, which sum back into the prompt; with 512 + 128
slots and G = 8 the first has 3.3 times fewer slots to compute.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.types import Branches, Mask, Model, Params, Rollout

LEAST_GAIN = 1.1
"""By how many times fewer slots a shared pass is taken: at 1.03 it took as long on a CPU."""


class Sequences(struct.PyTreeNode):
    """B sampled completions of C slots, and the rows that a teacher-forced pass takes.

    A row of `tokens` is a prompt and its completion or, where `mask` is of `Branches`, a prompt and
    G completions, those of batch rows p G to p G + G - 1.
    """

    tokens: Int[Array, "rows T"]
    mask: Mask
    completion_ids: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]


def completions_together(
    slots: tuple[int, int], prompts: int, generations: int, parts: int = 1
) -> int:
    """How many of a prompt's completions share a pass over it; 1 where that gains little.

    The most that leave every part whole rows.

    Args:
      slots: S and C, a prompt's and a completion's.
      prompts, generations: P and G of the batch.
      parts: micro-batches times the shares of a mesh.
    """
    fits = lambda n: generations % n == 0 and prompts * generations // n % parts == 0
    most = max((n for n in range(2, generations + 1) if fits(n)), default=1)
    gain = most * sum(slots) / (slots[0] + most * slots[1])
    return most if gain >= LEAST_GAIN else 1


def sequences_of(rollout: Rollout, generations: int = 1, parts: int = 1) -> Sequences:
    """The completions of a rollout in rows, `completions_together` in each."""
    ids, sampled = rollout.completion_ids, rollout.completion_mask
    slots = rollout.prompt_ids.shape[1], ids.shape[1]
    together = completions_together(slots, len(ids) // generations, generations, parts)
    if together == 1:
        return Sequences(rollout.tokens, rollout.mask, ids, sampled)
    once = lambda x: x[::together]
    side_by_side = ids.reshape(-1, together * slots[1])
    tokens = jnp.concatenate([once(rollout.prompt_ids), side_by_side], axis=1)
    mask = Branches(once(rollout.prompt_mask), sampled.reshape(-1, together, slots[1]))
    return Sequences(tokens, mask, ids, sampled)


def rollout_of(batch: Sequences) -> Rollout:
    """The completions again, a row each with its prompt, of log-probs 0."""
    rows, slots = batch.completion_ids.shape
    if isinstance(batch.mask, Branches):
        each = lambda x: jnp.repeat(x, batch.mask.completions.shape[1], axis=0)
        split = batch.mask.prompt.shape[1]
        prompts = each(batch.tokens[:, :split]), each(batch.mask.prompt)
        sampled = batch.mask.completions.reshape(rows, slots)
    else:
        prompts = batch.tokens[:, :-slots], batch.mask[:, :-slots]
        sampled = batch.mask[:, -slots:]
    logps = jnp.zeros((rows, slots), jnp.float32)
    return Rollout(*prompts, batch.completion_ids, sampled, logps)


def completion_features(
    model: Model, backbone: Params, batch: Sequences | Rollout
) -> Float[Array, "B C D"]:
    """φ at the slots that predict each completion token.

    A completion's first token is predicted by the prompt's last slot, which its completions share.
    """
    rows, slots = batch.completion_ids.shape
    features = model.features(backbone, batch.tokens, batch.mask)
    if not isinstance(batch.mask, Branches):
        return features[:, -slots - 1 : -1]
    split, generations = batch.mask.prompt.shape[1], batch.mask.completions.shape[1]
    first = jnp.repeat(features[:, split - 1], generations, axis=0)
    own = features[:, split:].reshape(rows, slots, -1)
    return jnp.concatenate([first[:, None], own[:, :-1]], axis=1)


batch_features = jax.jit(completion_features, static_argnums=0)
"""`completion_features`, jitted: one pass over a rollout batch for all its inner epochs."""
