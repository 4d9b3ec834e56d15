"""Float32 at the sites, whatever a run computes in.

An update of a usual learning rate moves a logit by less than bfloat16 resolves: the difference of
two such passes is their rounding. So sites are measured by a pass of float32, or better where the
model has it, with products of float32 on devices whose default is less (TF32 on a GPU, one pass of
bfloat16 on a TPU).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdyn.types import Model


def in_float32(model: Model) -> Any:
    """The same model, computing in float32 or better; a dataclass, as all models are."""
    wide = jnp.promote_types(model.dtype, jnp.float32)
    if wide == jnp.dtype(model.dtype):
        return model
    return dataclasses.replace(model, dtype=wide.type)  # type: ignore[type-var]


def exact_products(function: Callable) -> Callable:
    """The function with float32 products in float32, on every device."""

    @functools.wraps(function)
    def run(*arguments, **options):
        with jax.default_matmul_precision("float32"):
            return function(*arguments, **options)

    return run
