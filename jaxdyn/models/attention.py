"""Grouped-query attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdyn.models.fused import AttentionKind, cudnn, cudnn_can, splash, splash_can
from jaxdyn.models.packed import moved
from jaxdyn.models.visibility import Seen

BLOCK = 256
"""Queries whose weights are there at once."""


def plain_attention(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B K kv_heads width"],
    value: Float[Array, "B K kv_heads width"],
    mask: Bool[Array, "B 1 T K"],
) -> Float[Array, "B T heads width"]:
    """softmax(Q Kᵀ / √width) V, with the softmax in float32 or better.

    A query that sees nothing averages the values it would see none of: a finite answer with a
    finite gradient, which nobody reads. Heads come first inside, and the queries that share a key
    head go through one matrix product, so no key is repeated.
    """
    batch, slots, _, width = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    grouped = query.reshape(batch, slots, key.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    scores = product("bhgtw,bhkw->bhgtk", grouped, key) / np.sqrt(width)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(wide).min / 2)
    # Divided after the product, whose gradient then needs no sum over T x K weights.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = product("bhgtk,bhkw->bhgtw", weights.astype(value.dtype), value)
    mixed = (mixed / weights.sum(-1, keepdims=True)).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def attention(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B T kv_heads width"],
    value: Float[Array, "B T kv_heads width"],
    mask: Bool[Array, "B 1 T T"] | Seen,
    kind: AttentionKind = "plain",
) -> Float[Array, "B T heads width"]:
    """`plain_attention` of each slot on those up to itself; the T x T weights are never kept.

    Of another `kind` it is the fused kernel, where that takes such arrays, and else the plain one:
    its backward pass computes the weights again, which halves an update's memory at T = 224 with
    8 heads of 8 and takes no longer than to write and read them. Its queries go in up to four parts
    of 64 or more, each with the keys up to its last query, so that most of what the mask hides is
    never computed; and a part's by `BLOCK`s one after another, so that no more than BLOCK x T
    weights of a head are there at once, in forward mode too. Sums over parts and blocks, which make
    the gradients of keys and values, are in float32 or better.

    `mask` must hide every slot after the query's own. Where rows branch, the prompts attend so, and
    a completion's queries to the prompt's keys and then so to their own: by `shared_attention`, or
    cuDNN's with the prompt's keys repeated; the splash kernel has no part in completions.
    """
    if isinstance(mask, Seen):
        if mask.packed is not None:
            return _packed(query, key, value, mask, kind)
        return _branched(query, key, value, mask, kind)
    if kind == "cudnn" and cudnn_can(query.dtype, query.shape):
        return cudnn(query, key, value, mask=mask)
    if kind == "splash" and splash_can(query.dtype, query.shape):
        return splash(query, key, value, mask)
    return _in_parts(plain_attention, query, (), (key, value), mask)


def _branched(query, key, value, mask: Seen, kind):
    """Attention of P rows of a prompt's S slots and then G completions' C."""
    completions = mask.completions
    prompts, generations, slots = completions.shape[:3]
    split = query.shape[1] - generations * slots
    prompt = attention(query[:, :split], key[:, :split], value[:, :split], mask.prompt, kind)
    shared = key[:, :split], value[:, :split]
    alone = lambda x: x[:, split:].reshape(prompts * generations, slots, *x.shape[2:])
    query, *own = map(alone, (query, key, value))
    visible = completions.reshape(len(query), 1, slots, -1)
    if kind == "cudnn" and cudnn_can(query.dtype, query.shape) and split % 2 == 0:
        each = (jnp.repeat(x, generations, axis=0) for x in shared)
        held = (jnp.concatenate(pair, axis=1) for pair in zip(each, own, strict=True))
        mixed = cudnn(query, *held, mask=visible)
    else:
        mixed = _in_parts(shared_attention, query, shared, own, visible)
    return jnp.concatenate([prompt, mixed.reshape(prompts, -1, *mixed.shape[2:])], axis=1)


def _packed(query, key, value, mask: Seen, kind):
    """Attention of rows of several prompts and what their completions hold: in their own rows."""
    prompts = len(mask.completions)
    start = mask.prompt.shape[-1]
    split = prompts // len(query) * start

    def apart(x):
        own = moved(x[:, split:], mask.spread, mask.packed)
        by_prompt = lambda x: x.reshape(prompts, -1, *x.shape[2:])
        return jnp.concatenate([by_prompt(x[:, :split]), by_prompt(own)], axis=1)

    still = Seen(mask.prompt, mask.completions)
    mixed = _branched(apart(query), apart(key), apart(value), still, kind)
    again = lambda x: x.reshape(len(query), -1, *x.shape[2:])
    own = moved(again(mixed[:, start:]), mask.packed, mask.spread)
    return jnp.concatenate([again(mixed[:, :start]), own], axis=1)


def _in_parts(attend, query, shared, own, mask):
    """`attend` of queries to all shared keys and values, and to their own up to themselves."""
    wide = lambda x: x.astype(jnp.promote_types(query.dtype, jnp.float32))
    shared, own = [wide(x) for x in shared], [wide(x) for x in own]
    slots = query.shape[1]
    before = mask.shape[3] - slots
    size = -(-slots // max(1, min(4, slots // 64)))
    parts = []
    for start in range(0, slots, size):
        rows, end = slice(start, start + size), start + size
        held = *shared, *(x[:, :end] for x in own)
        parts.append(_by_blocks(attend, query[:, rows], held, mask[:, :, rows, : before + end]))
    return jnp.concatenate(parts, axis=1)


def _by_blocks(attend, query, held, mask):
    """`attend` of T queries to wide keys and values, no more than `BLOCK` queries at a time."""

    # A scan over the layers leaves nothing that could undo the checkpoint: no barrier is needed.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(query, held, mask):
        return attend(query, *held, mask)

    def block(query, mask):
        return of_block(query, [x.astype(query.dtype) for x in held], mask)

    batch, slots, heads, width = query.shape
    count = -(-slots // BLOCK)
    if count == 1:
        return block(query, mask)
    each = -(-slots // count)
    fill = [(0, 0), (0, count * each - slots)]
    queries = jnp.pad(query, [*fill, (0, 0), (0, 0)]).reshape(batch, count, each, heads, width)
    masks = jnp.pad(mask[:, 0], [*fill, (0, 0)]).reshape(batch, count, 1, each, -1)
    along = lambda x: x.swapaxes(0, 1)
    mixed = jax.lax.map(lambda given: block(*given), (along(queries), along(masks)))
    return along(mixed).reshape(batch, count * each, heads, width)[:, :slots]


def shared_attention(
    query: Float[Array, "B T heads width"],
    prompt_key: Float[Array, "P S kv_heads width"],
    prompt_value: Float[Array, "P S kv_heads width"],
    key: Float[Array, "B K kv_heads width"],
    value: Float[Array, "B K kv_heads width"],
    mask: Bool[Array, "B 1 T columns"],
) -> Float[Array, "B T heads width"]:
    """`plain_attention` of completions on their prompt's slots and then their own, S + K columns.

    Row p G + g continues prompt p. What the G of them ask of a prompt is one matrix product a key
    head, so that no prompt is repeated.
    """
    prompts, _, kv_heads, width = prompt_key.shape
    batch, slots = query.shape[:2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    # p prompt, h key head, g generation, q query of that head, t its slot, k key's slot, w width
    prompt_key, prompt_value = (x.swapaxes(1, 2) for x in (prompt_key, prompt_value))
    by_prompt = lambda x: x.reshape(prompts, -1, *x.shape[1:])
    key, value = (by_prompt(x).transpose(0, 3, 1, 2, 4) for x in (key, value))
    asked = by_prompt(query.reshape(batch, slots, kv_heads, -1, width)).transpose(0, 3, 1, 4, 2, 5)
    visible, split = by_prompt(mask)[:, None], prompt_key.shape[2]

    def scores(key, terms, visible):
        scaled = product(terms, asked, key) / np.sqrt(width)
        return jnp.where(visible, scaled, jnp.finfo(wide).min / 2)

    # One softmax over two products, whose scores are not copied side by side.
    shared = scores(prompt_key, "phgqtw,phkw->phgqtk", visible[..., :split])
    own = scores(key, "phgqtw,phgkw->phgqtk", visible[..., split:])
    peak = jnp.maximum(shared.max(-1, keepdims=True), own.max(-1, keepdims=True))
    shared, own = (jnp.exp(x - jax.lax.stop_gradient(peak)) for x in (shared, own))
    total = shared.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    mixed = product("phgqtk,phkw->phgqtw", shared.astype(value.dtype), prompt_value)
    mixed += product("phgqtk,phgkw->phgqtw", own.astype(value.dtype), value)
    mixed = (mixed / total).astype(query.dtype)
    return mixed.transpose(0, 2, 4, 1, 3, 5).reshape(query.shape)


def cached_attention(
    query: Float[Array, "B 1 heads width"],
    prompt_key: Float[Array, "P kv_heads S width"],
    prompt_value: Float[Array, "P kv_heads S width"],
    key: Float[Array, "B kv_heads C width"],
    value: Float[Array, "B kv_heads C width"],
    mask: Bool[Array, "B 1 1 K"],
) -> Float[Array, "B 1 heads width"]:
    """`plain_attention` of one query a sequence on its prompt's slots and then its own, K = S + C.

    Row p G + g continues prompt p. The G generations of a prompt, and the queries that share a
    key head, go through one matrix product each, so that nothing cached is repeated. The softmax
    is at least float32.
    """
    prompts, kv_heads, split, width = prompt_key.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    # p prompt, g generation, h key head, q query of that head, k slot, w width
    grouped = query.reshape(prompts, -1, kv_heads, query.shape[2] // kv_heads, width)
    key, value = (x.reshape(*grouped.shape[:2], *x.shape[1:]) for x in (key, value))
    shared = product("pghqw,phkw->pghqk", grouped, prompt_key)
    scores = jnp.concatenate([shared, product("pghqw,pghkw->pghqk", grouped, key)], axis=-1)
    visible = mask.reshape(*grouped.shape[:2], 1, 1, -1)
    scores = jnp.where(visible, scores / np.sqrt(width), jnp.finfo(scores.dtype).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("pghqk,phkw->pghqw", weights[..., :split], prompt_value)
    mixed += jnp.einsum("pghqk,pghkw->pghqw", weights[..., split:], value)
    return mixed.reshape(query.shape)
