"""bfloat16 compute on float32 master weights: where each sum is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from jaxdyn.train.update import accumulate

ROWS = 32


def test_gradients_reach_the_master_weights_and_add_up_in_float32():
    """32 equal parts: in bfloat16 the running sum would lose its last bits to 2^-9 of itself."""
    model, params = oracles.tiny_model("llama-untied", jnp.float32)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, oracles.VOCAB, (ROWS, 6)), jnp.int32)

    def value(params, tokens):
        features = model.features(params["backbone"], tokens, jnp.ones(tokens.shape, bool))
        return jnp.sum(jnp.sin(model.logits(params["classifier"], features)))

    gradient = jax.jit(jax.grad(value))
    total = jax.jit(lambda p, t: accumulate(lambda t: jax.grad(value)(p, t), t, ROWS))
    got = total(params, tokens)
    parts = [gradient(params, row[None]) for row in tokens]
    assert {x.dtype for x in jax.tree.leaves((got, parts))} == {jnp.dtype("float32")}

    def check(got, *parts):
        exact = np.sum(np.stack(parts).astype(np.float64), axis=0)
        size = np.sum(np.abs(np.stack(parts)), axis=0)
        # 31 additions, each rounded to 2^-24 of at most the sum of sizes.
        assert (np.abs(got - exact) <= ROWS * 2.0**-24 * size).all()

    jax.tree.map(check, got, *parts)
