"""The head path's part of a tied matrix's update, against sums over the gradients' history."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.optim import OptimConfig, head_direction, make_optimizer

STEPS, SHAPE = 5, (7, 3)
RNG = np.random.default_rng(0)
HEAD, EMBED = RNG.standard_normal((2, STEPS, *SHAPE))
REST = RNG.standard_normal((STEPS, 4))


def clip_factors(limit):
    """min(1, limit / ‖g‖) at every step, over the shared matrix and the other parameters."""
    norms = np.sqrt(((HEAD + EMBED) ** 2).sum((1, 2)) + (REST**2).sum(1))
    return np.minimum(1, limit / norms) if limit else np.ones(STEPS)


def adam_share(config, path, step):
    """P m of one path's gradients alone, under the whole gradient's preconditioner P."""
    clip = clip_factors(config.max_grad_norm)[: step + 1]
    ages = np.arange(step, -1, -1)
    scaled = lambda g: clip[:, None, None] * g[: step + 1]
    sum_of = lambda decay, x: np.einsum("s,sij->ij", (1 - decay) * decay**ages, x)
    mean = sum_of(config.b1, scaled(path)) / (1 - config.b1 ** (step + 1))
    square = sum_of(config.b2, scaled(HEAD + EMBED) ** 2) / (1 - config.b2 ** (step + 1))
    return mean / (np.sqrt(square) + config.eps)


def sgd_share(config, path, step):
    clip = clip_factors(config.max_grad_norm)[: step + 1]
    return np.einsum(
        "s,sij->ij", clip * config.momentum ** np.arange(step, -1, -1.0), path[: step + 1]
    )


@pytest.mark.parametrize("limit", [0.0, 3.0])
@pytest.mark.parametrize(
    "kind, share",
    [
        ({"optimizer": "adamw", "eps": 1e-3}, adam_share),
        ({"optimizer": "sgd", "momentum": 0.8}, sgd_share),
        ({"optimizer": "sgd"}, sgd_share),
    ],
    ids=["adamw", "momentum", "sgd"],
)
def test_the_two_paths_shares_make_up_the_whole_update(kind, share, limit, x64):
    config = OptimConfig(max_grad_norm=limit, **kind)
    assert (clip_factors(limit) < 1).all() == bool(limit)
    optimizer = make_optimizer(config)
    tree = lambda shared, rest: {
        "backbone": {"embed": {"embedding": jnp.asarray(shared)}, "rest": jnp.asarray(rest)},
        "classifier": {},
    }
    params = tree(np.zeros(SHAPE), np.zeros(4))
    state, moment = optimizer.init(params), jnp.zeros(SHAPE)
    for step in range(STEPS):
        gradient = tree(HEAD[step] + EMBED[step], REST[step])
        norm = jnp.sqrt(((HEAD[step] + EMBED[step]) ** 2).sum() + (REST[step] ** 2).sum())
        direction, state = optimizer.update(gradient, state, params)
        head = jnp.asarray(HEAD[step])
        moment, got = head_direction(config, moment, head, norm, state[1]["backbone"][0])
        whole = np.asarray(direction["backbone"]["embed"]["embedding"])
        np.testing.assert_allclose(got, share(config, HEAD, step), rtol=1e-10)
        np.testing.assert_allclose(whole - got, share(config, EMBED, step), rtol=1e-9, atol=1e-12)
