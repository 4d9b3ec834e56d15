"""Rotary positions, which layers may have of several kinds, or not at all."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdyn.models.config import ModelConfig, RotaryScaling


def rotary_frequencies(
    dim: int, base: float, scaling: RotaryScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Angular frequencies base^(-2i / dim), scaled as `scaling` says."""
    frequencies = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * np.pi / frequencies
    periods = scaling.original_max_positions / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((periods - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_kinds(
    config: ModelConfig,
) -> tuple[Float[np.ndarray, "kinds half"], Int[np.ndarray, " L"]]:
    """The frequencies that the model's layers have, and which of them each layer has.

    Layers with a window may have a base of their own, which is not scaled; a layer without rotary
    positions has frequencies of zero, at which nothing turns.
    """
    c = config
    whole = rotary_frequencies(c.rotary_dim, c.rotary_base, c.rotary_scaling)
    near = whole
    if c.window_rotary_base is not None:
        near = rotary_frequencies(c.rotary_dim, c.window_rotary_base)
    rows = [
        (near if windowed else whole) * rotated
        for windowed, rotated in zip(c.windowed_by_layer, c.rotated_by_layer, strict=True)
    ]
    kinds, of_layer = np.unique(np.stack(rows), axis=0, return_inverse=True)
    return kinds, of_layer.reshape(-1)


def rotary_tables(
    frequencies: Float[np.ndarray, "kinds half"], positions: Int[Array, "B T"], dtype
) -> tuple[Float[Array, "kinds B T 1 half"], Float[Array, "kinds B T 1 half"]]:
    """Cosines and sines of position times frequency, computed in float32 or better."""
    wide = jnp.promote_types(dtype, jnp.float32)
    turning = jnp.asarray(frequencies, wide)[:, None, None, None, :]
    angles = positions.astype(wide)[None, :, :, None, None] * turning
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
