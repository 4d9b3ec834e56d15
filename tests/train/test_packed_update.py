"""A supervised update on packed rows is that on a row an example."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from test_update import ADAM, fresh

from jaxdyn.data import pack
from jaxdyn.train.sft import supervised_update


def test_packing_changes_no_number(x64):
    """Loss and Adam's step, in two micro-batches, of a tied model with a window of two tokens."""
    model, params = oracles.tiny_model("gemma3_text-tied")
    rng = np.random.default_rng(0)
    lengths = np.array([8, 3, 2, 5, 4, 2, 3, 5])[:, None]
    mask = np.arange(8) < lengths
    tokens = np.where(mask, rng.integers(0, oracles.VOCAB, mask.shape), 0)
    predicted = mask & (np.arange(8) >= lengths // 2)
    apart = tuple(map(jnp.asarray, (tokens, mask, predicted)))
    packed = pack(*apart, parts=2)
    assert len(packed[0]) == 4 and np.asarray(packed[1]).max() == 3

    def run(encoded):
        static = {"model": model, "optim": ADAM, "microbatches": 2}
        state = fresh(model, params, ADAM)
        return supervised_update(state, {}, encoded, jnp.float64(0.01), **static)

    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    jax.tree.map(close, run(packed), run(apart))
