"""What an applied update is the sum of, against the update itself."""

import jax
import numpy as np
import optax
import pytest
from test_optimizer import BODY, HEAD, tree

from jaxdyn.optim import OptimConfig, applied_parts, make_optimizer

RATE = 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("multiplier", [1.0, 7.0])
def test_the_parts_add_up_to_the_update(optimizer, multiplier, x64):
    """−M ⊙ c g + momentum + decay, the classifier's with η μ, after a first step of another g."""
    config = OptimConfig(
        optimizer=optimizer,
        momentum=0.5,
        weight_decay=0.1,
        max_grad_norm=2.0,
        classifier_multiplier=multiplier,
    )
    rule, params = make_optimizer(config), tree(BODY[2], HEAD[2])
    _, before = rule.update(tree(BODY[0], HEAD[0]), rule.init(params), params)
    gradient = tree(BODY[1], HEAD[1])
    direction, after = rule.update(gradient, before, params)
    norm = float(optax.tree.norm(gradient))
    parts = applied_parts(config, params, before, after, RATE, norm)
    assert norm > 2 and parts.clip == pytest.approx(2 / norm)
    whole = jax.tree.map(
        lambda m, g, past, decay: -m * parts.clip * g + past + decay,
        *(parts.metric, gradient, parts.momentum, parts.decay),
    )
    jax.tree.map(
        lambda x, d: np.testing.assert_allclose(x, -RATE * d, rtol=1e-12), whole, direction
    )
