"""The scalar head on the features: how much reward a prefix promises."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdyn.types import Params


def init_value_head(width: int) -> Params:
    """A head that values everything at 0, so that advantages begin as plain returns."""
    return {"weight": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def state_values(head: Params, features: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """v = ⟨w, φ⟩ + b, in float32 or better."""
    wide = jnp.promote_types(features.dtype, head["weight"].dtype)
    return features.astype(wide) @ head["weight"] + head["bias"]
