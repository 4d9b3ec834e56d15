"""What the slots of a row see of each other, and the places of their tokens.

A row holds one sequence; or several, one after another; or a prompt and G completions of it. A
token sees those up to itself of its own sequence, of which a completion's begins with the prompt.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxdyn.models.packed import spread
from jaxdyn.types import Branches, Mask


class Seen(NamedTuple):
    """What prompts see of themselves, and what G completions see of prompt and themselves.

    The pytree that stands for `[kinds, B, 1, T, K]` where rows branch: of S + G C slots a
    completion's C have S + C columns. Where the completions are packed, `packed` are the slots that
    their tokens have here, and `spread` the way back (`jaxdyn.models.packed`).
    """

    prompt: Bool[Array, "*kinds P 1 S S"]
    completions: Bool[Array, "*kinds P G C K"]
    packed: Int[Array, "*kinds R M"] | None = None
    spread: Int[Array, "*kinds R N"] | None = None


def positions_of(mask: Mask) -> Int[Array, "B T"]:
    """The place of each token among its sequence's tokens, from 0; padding gets no more.

    Padding before a sequence gets 0, and after it its last token's place.
    """
    if isinstance(mask, Branches):
        prompt, completions = _branch_positions(mask)
        rows = len(prompt) if mask.packed is None else len(mask.packed)
        inside = completions.reshape(rows, -1)
        if mask.packed is not None:
            inside = jnp.take_along_axis(inside, jnp.maximum(mask.packed, 0), axis=1)
        return jnp.concatenate([prompt.reshape(rows, -1), inside], axis=1)
    tokens = mask != 0
    count = jnp.cumsum(tokens, axis=1)
    if mask.dtype != bool:
        begins = jnp.diff(mask, axis=1, prepend=-1) != 0
        count -= jax.lax.cummax(jnp.where(begins, count - tokens, 0), axis=1)
    return jnp.maximum(count - 1, 0).astype(jnp.int32)


def _branch_positions(mask: Branches) -> tuple[Int[Array, "P S"], Int[Array, "P G C"]]:
    """The completions' count on from their prompt's."""
    before = jnp.sum(mask.prompt, axis=1)[:, None, None]
    inside = jnp.maximum(before + jnp.cumsum(mask.completions, axis=2) - 1, 0)
    return positions_of(mask.prompt), inside.astype(jnp.int32)


def visible(mask: Mask, window: int | None) -> Any:
    """Which slots (last axis) a slot attends to, by kind of layer: [kinds, B, 1, T, T], or `Seen`.

    The kinds are whole layers and, if `window` says so, those that see that many tokens.
    """
    if isinstance(mask, Branches):
        places, inside = _branch_positions(mask)
        beside = lambda shared, own: _joined(shared[:, None], own)
        seen = jnp.broadcast_to(mask.prompt[:, None, None], (*inside.shape, places.shape[1]))
        causal = _causal(mask.completions)
        whole = jnp.concatenate([seen, causal & mask.completions[:, :, None, :]], axis=-1)
        completions = by_kind(whole, inside, beside(places, inside), window)
        prompt = visible(mask.prompt, window)
        if mask.packed is None:
            return Seen(prompt, completions)
        each = lambda x: jnp.broadcast_to(x, (len(prompt), *x.shape))
        return Seen(prompt, completions, each(mask.packed), each(spread(mask)))
    places = positions_of(mask)[:, None]
    seen = _causal(mask[:, None]) & (mask != 0)[:, None, None, :]
    if mask.dtype != bool:
        seen &= mask[:, None, :, None] == mask[:, None, None, :]
    return by_kind(seen, places, places, window)


def _causal(slots: Array) -> Bool[Array, "1 1 T T"]:
    """Of slots [..., T]: each and those before it."""
    numbers = jnp.arange(slots.shape[-1])
    return (numbers[:, None] >= numbers[None, :])[None, None]


def _joined(shared, own):
    """The prompts' [P, 1, S] and the completions' [P, G, C] side by side, [P, G, S + C]."""
    return jnp.concatenate([jnp.broadcast_to(shared, (*own.shape[:2], shared.shape[2])), own], 2)


def by_kind(
    whole: Bool[Array, "A B T K"],
    query: Int[Array, "A B T"],
    key: Int[Array, "A B K"],
    window: int | None,
) -> Bool[Array, "kinds A B T K"]:
    """The mask of whole layers and, if there are some, that of layers with a window.

    A window counts tokens, by the positions of queries and keys.
    """
    if window is None:
        return whole[None]
    near = query[..., :, None] - key[..., None, :] < window
    return jnp.stack([whole, whole & near])
