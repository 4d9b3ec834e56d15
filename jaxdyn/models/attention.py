"""Grouped-query attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


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
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = product("bhgtk,bhkw->bhgtw", weights, value).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def attention(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B T kv_heads width"],
    value: Float[Array, "B T kv_heads width"],
    mask: Bool[Array, "B 1 T T"],
) -> Float[Array, "B T heads width"]:
    """`plain_attention` of each slot on those up to itself; the T x T weights are never kept.

    On a GPU it is cuDNN's fused one, where that applies. Elsewhere the backward pass computes the
    weights again, which halves an update's memory at T = 224 with 8 heads of 8 and takes no longer
    than to write and read them. There the queries also go in up to four blocks of 64 or more, each
    with the keys up to its last query, so that most of what the mask hides is never computed.
    `mask` must hide every slot after the query's own.
    """
    if jax.default_backend() == "gpu" and cudnn_can(query.dtype, query.shape):
        fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return fused(query, key, value, mask=mask)
    # A scan over the layers leaves nothing that could undo the checkpoint: no barrier is needed.
    recomputed = jax.checkpoint(plain_attention, prevent_cse=False)
    size = -(-query.shape[1] // max(1, min(4, query.shape[1] // 64)))
    blocks = []
    for start in range(0, query.shape[1], size):
        rows, seen = slice(start, start + size), slice(start + size)
        part = mask[:, :, rows, seen]
        blocks.append(recomputed(query[:, rows], key[:, seen], value[:, seen], part))
    return jnp.concatenate(blocks, axis=1)


def cudnn_can(dtype, shape: tuple[int, ...]) -> bool:
    """Whether cuDNN has an attention of queries [B, T, heads, width] with a mask and a gradient.

    It takes half precision, heads of a multiple of 8 up to 128, and an even number of slots.
    """
    _, slots, _, width = shape
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and width % 8 == 0 and width <= 128 and slots % 2 == 0


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
