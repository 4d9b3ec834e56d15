"""Matrices held in another dtype than the rest of the parameters."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdyn.types import Params

TABLE = "embedding"
MATRICES = ("kernel", TABLE, "weight", "lora_a", "lora_b")


def held(params: Params, dtype: Any, names: Collection[str] = MATRICES) -> Params:
    """The parameters with their matrices in `dtype`; those that are in it already are not copied.

    A pass in that dtype rounds its matrices anyway, and gives the same numbers, bit for bit. Leaves
    may also be shapes; in float32 all stay as they are.
    """
    leaves = flatten_dict(params, keep_empty_nodes=True)
    wanted = jnp.dtype(dtype)
    if wanted == jnp.float32:
        return params
    return unflatten_dict({p: x.astype(wanted) if p[-1] in names else x for p, x in leaves.items()})
