"""Rotary positions, which layers may have of several kinds, or not at all."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdyn.models.config import ModelConfig, RotaryScaling


def rotary_frequencies(
    dim: int, base: float, scaling: RotaryScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Angular frequencies base^(-2i / dim), scaled as `scaling` says."""
    i = np.arange(0, dim, 2, dtype=np.float64) / dim
    frequencies = base**-i
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        keep = np.zeros_like(i)
    elif scaling.kind == "llama3":
        periods = scaling.original_max_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((periods - low) / (high - low), 0.0, 1.0)
    else:
        # The component, not a whole number, that turns that many times in the trained context.
        turning = lambda times: (
            dim * math.log(scaling.original_max_positions / (2 * math.pi * times), base) / 2
        )
        first = max(math.floor(turning(scaling.beta_fast)), 0)
        last = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
        keep = 1 - np.clip((i * dim / 2 - first) / max(last - first, 1e-3), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_kinds(
    config: ModelConfig,
) -> tuple[Float[np.ndarray, "kinds columns"], Int[np.ndarray, " L"]]:
    """The model's kinds of rotary positions, and which of them each layer has.

    A kind is an amplitude and the frequencies. Layers with a window may have a base of their own,
    which is not scaled; a layer without rotary positions has frequencies of zero, at which nothing
    turns.
    """
    c, scaling = config, config.rotary_scaling
    amplitude = scaling.amplitude if scaling else 1.0
    whole = np.r_[amplitude, rotary_frequencies(c.rotary_dim, c.rotary_base, scaling)]
    near, none = whole, np.r_[1.0, np.zeros(c.rotary_dim // 2)]
    if c.window_rotary_base is not None:
        near = np.r_[1.0, rotary_frequencies(c.rotary_dim, c.window_rotary_base)]
    rows = [
        (near if windowed else whole) if rotated else none
        for windowed, rotated in zip(c.windowed_by_layer, c.rotated_by_layer, strict=True)
    ]
    kinds, of_layer = np.unique(np.stack(rows), axis=0, return_inverse=True)
    return kinds, of_layer.reshape(-1)


def rotary_tables(
    kinds: Float[np.ndarray, "kinds columns"], positions: Int[Array, "B T"], dtype
) -> tuple[Float[Array, "kinds B T 1 half"], Float[Array, "kinds B T 1 half"]]:
    """Cosines and sines of position times frequency, computed in float32 or better."""
    wide = jnp.promote_types(dtype, jnp.float32)
    amplitudes, frequencies = kinds[:, None, None, None, :1], kinds[:, None, None, None, 1:]
    angles = positions.astype(wide)[None, :, :, None, None] * jnp.asarray(frequencies, wide)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if (amplitudes != 1).any():
        cos, sin = (jnp.asarray(amplitudes, wide) * x for x in (cos, sin))
    return cos.astype(dtype), sin.astype(dtype)


def rotate(
    x: Float[Array, "B T heads width"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T heads width"]:
    """Rotate the first 2 * half components of every head; leave the rest."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
