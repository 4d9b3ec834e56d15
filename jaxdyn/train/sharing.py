"""One pass over a prompt for all of its completions, or for some of them at a time, and over these
without their padding.

    P rows of S + G C slots   instead of   P G rows of S + C slots

Both give the same features, and the same gradients, which sum back into the prompt; with 512 + 128
slots and G = 8 the first has 3.3 times fewer slots to compute.

Completions end early, most of them before the longest: where that leaves many slots empty, what
they hold lies packed, in one of few numbers of slots, so that programs are few.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.models.packed import moved, spread
from jaxdyn.types import Branches, Mask, Model, Params, Rollout

LEAST_GAIN = 1.1
"""By how many times fewer slots a shared pass is taken: at 1.03 it took as long on a CPU."""

PACKED_GAIN = 1.1
"""The same of a packed one, which has to move what attention reads and writes."""

FINENESS = 8
"""Into how many sizes of packed rows an octave is divided."""

SMALLEST_STEP = 256
"""Slots by which they differ at least: less saves less than another program costs to compile."""


class Sequences(struct.PyTreeNode):
    """B sampled completions of C slots, and the rows that a teacher-forced pass takes.

    A row of `tokens` is a prompt and its completion or, where `mask` is of `Branches`, a prompt and
    G completions, those of batch rows p G to p G + G - 1; or several prompts and then what their
    completions hold, packed.
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
    """The completions of a rollout in rows, `completions_together` in each, or packed in `parts`.

    Packed where that leaves `PACKED_GAIN` times fewer slots. Waits for the completions' mask.
    """
    ids, sampled = rollout.completion_ids, rollout.completion_mask
    slots = rollout.prompt_ids.shape[1], ids.shape[1]
    together = completions_together(slots, len(ids) // generations, generations, parts)
    packed = packed_slots(np.asarray(sampled), slots[0], together, parts)
    if packed is not None:
        prompts = rollout.prompt_ids[::together].reshape(parts, -1)
        held = jnp.take_along_axis(ids.reshape(parts, -1), jnp.maximum(packed, 0), axis=1)
        branches = Branches(
            rollout.prompt_mask[::together], sampled.reshape(-1, together, slots[1]), packed
        )
        return Sequences(jnp.concatenate([prompts, held], axis=1), branches, ids, sampled)
    if together == 1:
        return Sequences(rollout.tokens, rollout.mask, ids, sampled)
    once = lambda x: x[::together]
    side_by_side = ids.reshape(-1, together * slots[1])
    tokens = jnp.concatenate([once(rollout.prompt_ids), side_by_side], axis=1)
    mask = Branches(once(rollout.prompt_mask), sampled.reshape(-1, together, slots[1]))
    return Sequences(tokens, mask, ids, sampled)


def packed_slots(
    sampled: Bool[np.ndarray, "B C"], prompt_slots: int, together: int, parts: int
) -> Int[Array, "R M"] | None:
    """What the completions of each of R = `parts` rows hold, by number, or None: too little is
    saved.

    M is the most that one of the rows holds, rounded up to one of `FINENESS` sizes an octave, so
    that at most 1/(FINENESS + 1) of it is empty where all rows hold the same.
    """
    if len(sampled) // together % parts:
        return None
    rows = sampled.reshape(parts, -1)
    most = int(rows.sum(axis=1).max())
    most = max(most, 1)
    step = max(SMALLEST_STEP, (1 << most.bit_length() - 1) // FINENESS)
    kept = min(-(-most // step) * step, rows.shape[1])
    prompts = len(sampled) // together // parts * prompt_slots
    if prompts + rows.shape[1] < PACKED_GAIN * (prompts + kept):
        return None
    found = np.full((parts, kept), -1, np.int32)
    for row, held in zip(found, rows, strict=True):
        places = np.flatnonzero(held)
        row[: len(places)] = places
    return jnp.asarray(found)


def rollout_of(batch: Sequences) -> Rollout:
    """The completions again, a row each with its prompt, of log-probs 0."""
    rows, slots = batch.completion_ids.shape
    if isinstance(batch.mask, Branches):
        each = lambda x: jnp.repeat(x, batch.mask.completions.shape[1], axis=0)
        split = batch.mask.prompt.size // len(batch.tokens)
        ids = batch.tokens[:, :split].reshape(batch.mask.prompt.shape)
        prompts = each(ids), each(batch.mask.prompt)
        sampled = batch.mask.completions.reshape(rows, slots)
    else:
        prompts = batch.tokens[:, :-slots], batch.mask[:, :-slots]
        sampled = batch.mask[:, -slots:]
    logps = jnp.zeros((rows, slots), jnp.float32)
    return Rollout(*prompts, batch.completion_ids, sampled, logps)


def completion_features(
    model: Model, backbone: Params, batch: Sequences | Rollout
) -> Float[Array, "B C D"]:
    """φ at the slots that predict each completion token; of packed completions 0 in the others."""
    return of_completions(batch, slot_features(model, backbone, batch))


def packed_in(batch: Sequences | Rollout) -> tuple[Branches, Array] | None:
    """The branches and which of their slots lie in rows without padding, or None: they do not."""
    mask: Mask = batch.mask
    if isinstance(mask, Branches) and mask.packed is not None:
        return mask, mask.packed
    return None


def slot_ids(batch: Sequences | Rollout) -> Int[Array, "B C"]:
    """The completions' tokens as they lie, which `slot_features` predict: packed [R, M]."""
    found = packed_in(batch)
    return batch.completion_ids if found is None else batch.tokens[:, -found[1].shape[1] :]


def of_completions(batch: Sequences | Rollout, x: Array) -> Array:
    """What was found of the slots as they lie, [R, M, ...], by completion, [B, C, ...]; 0 where
    nothing lies."""
    found = packed_in(batch)
    if found is None:
        return x
    mask, packed = found
    return moved(x, spread(mask), packed).reshape(*batch.completion_ids.shape, *x.shape[2:])


def slot_features(
    model: Model, backbone: Params, batch: Sequences | Rollout
) -> Float[Array, "B C D"]:
    """φ at the slots that predict each completion token, as these lie: packed [R, M, D].

    A completion's first token is predicted by the prompt's last slot, which its completions share.
    """
    rows, slots = batch.completion_ids.shape
    features = model.features(backbone, batch.tokens, batch.mask)
    if not isinstance(batch.mask, Branches):
        return features[:, -slots - 1 : -1]
    split, generations = batch.mask.prompt.shape[1], batch.mask.completions.shape[1]
    if batch.mask.packed is not None:
        return _packed_features(features, batch.mask, batch.mask.packed)
    first = jnp.repeat(features[:, split - 1], generations, axis=0)
    own = features[:, split:].reshape(rows, slots, -1)
    return jnp.concatenate([first[:, None], own[:, :-1]], axis=1)


def _packed_features(
    features: Float[Array, "R T D"], mask: Branches, packed: Int[Array, "R M"]
) -> Float[Array, "R M D"]:
    """Of rows of prompts and their packed completions: of the slot before, or the prompt's last."""
    _, generations, slots = mask.completions.shape
    start = mask.prompt.shape[1]
    split = features.shape[1] - packed.shape[1]
    last = features[:, start - 1 : split : start]
    before = jnp.concatenate([features[:, split : split + 1], features[:, split:-1]], axis=1)
    # A product: of a gather the gradient would be scattered.
    owner = jax.nn.one_hot(packed // (generations * slots), last.shape[1], dtype=features.dtype)
    exact = jax.lax.Precision.HIGHEST
    first = jnp.einsum("rmn,rnd->rmd", owner, last, precision=exact)
    begins = (packed % slots == 0)[..., None]
    return jnp.where(begins, first, before)


batch_features = jax.jit(completion_features, static_argnums=0)
"""`completion_features`, jitted: one pass over a rollout batch for all its inner epochs."""
