"""A layer's output, whose cotangent tells what each of the layer's parameters did, text by text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.types import Params


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def itemized(
    lora_scale: float,
    output: Float[Array, "B *slots O"],
    read: Array,
    own: Params,
    change: Params,
    items: dict[str, Float[Array, " B"]],
) -> Float[Array, "B *slots O"]:
    """`output`; from its cotangent δ the items, by parameter, have Σ_slots δ · `written` as theirs.

    That is ⟨∂h/∂θ, Δθ⟩ of each parameter θ of the layer and each text, of which no gradient is
    formed, nor anything kept that the backward pass does not have anyway. Neither parameters nor
    what was `read` has a cotangent: the layer itself gives them theirs.
    """
    del lora_scale, read, own, change, items
    return output


def _forward(lora_scale, output, read, own, change, items):
    return output, (read, own, change)


def _backward(lora_scale, kept, cotangent):
    read, own, change = kept
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)

    def item(name, delta):
        moved = written(name, delta, own, read, lora_scale).astype(wide)
        return jnp.sum(cotangent.astype(wide) * moved, axis=tuple(range(1, moved.ndim)))

    return cotangent, None, None, None, {name: item(name, x) for name, x in change.items()}


itemized.defvjp(_forward, _backward)


def written(name: str, change: Array, own: Params, read: Array, lora_scale: float) -> Any:
    """What a parameter's change alone adds to its layer's output, in float32 or better.

    Of a kernel a ΔK, of a table's rows ΔE[id], of a scale x̂ ⊙ Δs, of a bias Δb; of an adapter's
    factors s (a ΔA) B and s (a A) ΔB.
    """

    def dense(x, matrix):
        rows = x.reshape(-1, x.shape[-1])
        wide = jnp.promote_types(jnp.promote_types(x.dtype, jnp.float32), matrix.dtype)
        y = jnp.einsum("ri,io->ro", rows, matrix, precision="highest", preferred_element_type=wide)
        return y.reshape(*x.shape[:-1], matrix.shape[-1])

    match name:
        case "embedding":
            return change[read]
        case "kernel":
            return dense(read, change)
        case "scale":
            return read * change.reshape(*(1,) * (read.ndim - 1), -1)
        case "bias":
            return change.reshape(*(1,) * (read.ndim - 1), -1)
        case "lora_a":
            return lora_scale * dense(dense(read, change), own["lora_b"])
        case "lora_b":
            return lora_scale * dense(dense(read, own["lora_a"]), change)
    raise AssertionError(f"a layer has no {name}")
