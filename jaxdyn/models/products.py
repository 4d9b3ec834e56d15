"""Products of activations and matrices, with one axis of rows: what XLA does best."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


def matrix_product(x, kernel, dimension_numbers, **options):
    """x K for `nn.Dense`, with x's leading axes as one.

    Else the kernel's gradient contracts several axes, for which XLA on a CPU first writes a
    transposed copy of the output's cotangent, one component at a time.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def rows_product(
    x: Float[Array, "N D"], weight: Float[Array, "V D"], dtype: Any
) -> Float[Array, "N V"]:
    """x Wᵀ of operands in `dtype`, accumulated and returned in float32 or better.

    Below float32 its derivatives' products take operands in `dtype` too, and round to it once:
    by JAX's own rule a float32 cotangent would meet bfloat16 weights, a product that no matrix
    unit has.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    x, weight = x.astype(dtype), weight.astype(dtype)
    product = functools.partial(jnp.einsum, "nd,vd->nv", preferred_element_type=wide)
    return product(x, weight) if jnp.dtype(dtype) == wide else _narrow_product(x, weight)


@jax.custom_jvp
def _narrow_product(x, weight):
    return jnp.einsum("nd,vd->nv", x, weight, preferred_element_type=jnp.float32)


def _narrow_product_jvp(primals, tangents):
    (x, weight), (dx, d_weight) = primals, tangents
    along = lambda x, w: jnp.einsum("nd,vd->nv", x, w).astype(jnp.float32)
    terms = [] if isinstance(dx, SymbolicZero) else [along(dx, weight)]
    terms += [] if isinstance(d_weight, SymbolicZero) else [along(x, d_weight)]
    return _narrow_product(x, weight), sum(terms)


_narrow_product.defjvp(_narrow_product_jvp, symbolic_zeros=True)
