"""Rotary positions and grouped-query attention."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.models.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies base^(-2i / rotary_dim), scaled as the config says, [rotary_dim / 2]."""
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    frequencies = config.rotary_base**-exponent
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * np.pi / frequencies
    periods = scaling.original_max_positions / wavelength
    keep = (periods - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_tables(
    config: ModelConfig, positions: Int[Array, "B T"], dtype
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of position times frequency, computed in float32 or better."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = jnp.asarray(rotary_frequencies(config), wide)
    angles = positions.astype(wide)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "B T heads width"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T heads width"]:
    """Rotate the first 2 * half components of every head; leave the rest."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def plain_attention(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B K kv_heads width"],
    value: Float[Array, "B K kv_heads width"],
    mask: Bool[Array, "B #heads T K"],
) -> Float[Array, "B T heads width"]:
    """softmax(Q Kᵀ / √width) V in the inputs' own precision; the reference for the fused ones."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bthw,bkhw->bhtk", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min / 2), axis=-1)
    return jnp.einsum("bhtk,bkhw->bthw", weights, value)


def attention(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B K kv_heads width"],
    value: Float[Array, "B K kv_heads width"],
    mask: Bool[Array, "B #heads T K"],
) -> Float[Array, "B T heads width"]:
    """Attention by the platform's implementation; the softmax is at least float32.

    `jax.nn.dot_product_attention` always takes its softmax in float32, so float64 inputs, which
    only oracles and tests use, go the plain way.
    """
    if query.dtype == jnp.float64:
        return plain_attention(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def cached_attention(
    query: Float[Array, "B 1 heads width"],
    key: Float[Array, "B kv_heads K width"],
    value: Float[Array, "B kv_heads K width"],
    mask: Bool[Array, "B 1 1 K"],
) -> Float[Array, "B 1 heads width"]:
    """`plain_attention` of one query on a cache whose heads come before its slots.

    The queries that share a key head go through one matrix product, so no key is repeated; the
    softmax is at least float32.
    """
    batch, _, heads, width = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = jnp.einsum("bhgw,bhkw->bhgk", grouped, key, preferred_element_type=wide)
    scores = jnp.where(mask, scores / np.sqrt(width), jnp.finfo(wide).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhgk,bhkw->bhgw", weights, value).reshape(batch, 1, heads, width)
