"""Fused attention: cuDNN's on a GPU, JAX's splash kernel on a TPU.

Either is `plain_attention` of slots on those up to themselves, with a gradient by one cotangent and
no other derivative: for those see `LanguageModel.unfused`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

AttentionKind = Literal["plain", "cudnn", "splash"]
"""The full pass's attention: the plain one, or a fused one where that takes the arrays."""

FUSED: dict[str, AttentionKind] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
"""The fused one of a platform, as its devices name it."""

LANES = 128
"""Slots go to a TPU's kernel in multiples of these."""

SPLASH_SLOTS = 1024
"""From how many slots on the splash kernel is taken.

By the compiler's account (v5e, bfloat16) a gradient then moves half the plain one's bytes, at 2048
slots a fifth; at fewer the plain one's weights mostly stay on the chip.
"""


def cudnn_can(dtype, shape: tuple[int, ...]) -> bool:
    """Whether cuDNN has an attention of queries [B, T, heads, width] with a mask and a gradient.

    It takes half precision, heads of a multiple of 8 up to 128, and an even number of slots.
    """
    _, slots, _, width = shape
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and width % 8 == 0 and width <= 128 and slots % 2 == 0


def splash_can(dtype, shape: tuple[int, ...]) -> bool:
    """Whether the splash kernel is worth it for queries [B, T, heads, width], and takes them."""
    _, slots, _, width = shape
    return dtype in (jnp.bfloat16, jnp.float32) and width % 8 == 0 and slots >= SPLASH_SLOTS


cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def splash(
    query: Float[Array, "B T heads width"],
    key: Float[Array, "B T kv_heads width"],
    value: Float[Array, "B T kv_heads width"],
    mask: Bool[Array, "B 1 T T"],
    interpret: bool = False,
) -> Float[Array, "B T heads width"]:
    """Softmax in float32; the causal blocks alone are computed, and no weights are kept.

    The mask must hide the later slots, those without a token, and other sequences of the row, and
    nothing else: a sequence is read off it as what begins at the same slot. What slots without a
    token see is each other, unlike in the plain one, and nobody reads it.
    """
    # Pallas takes a while to import, and few have a use for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    slots, heads, width = query.shape[1:]
    whole = -(-slots // LANES) * LANES
    block = next(size for size in (4 * LANES, 2 * LANES, LANES) if whole % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    causal = kernels.MultiHeadMask([kernels.CausalMask((whole, whole))] * heads)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            causal,
            block_sizes=kernels.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

    def heads_first(x):
        return jnp.pad(x, [(0, 0), (0, whole - slots), (0, 0), (0, 0)]).swapaxes(1, 2)

    tokens = jnp.diagonal(mask[:, 0], axis1=1, axis2=2)
    numbers = jnp.where(tokens, 1 + jnp.argmax(mask[:, 0], axis=2).astype(jnp.int32), 0)
    numbers = jnp.pad(numbers, [(0, 0), (0, whole - slots)])
    scaled = query * jnp.asarray(width**-0.5, query.dtype)
    segments = kernels.SegmentIds(numbers, numbers)
    mixed = jax.vmap(kernel)(heads_first(scaled), heads_first(key), heads_first(value), segments)
    return mixed.swapaxes(1, 2)[:, :slots]
