"""Whole tiny runs with the sampler's weights and the entropy's control, and their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny_runs
from test_update import RATE, TEMPERATURE, fresh, tiny_batch

from jaxdyn.optim import OptimConfig
from jaxdyn.rl import CovarianceConfig, ImportanceConfig, LossConfig, held_back
from jaxdyn.train import open_run, run_rl, update
from jaxdyn.train.update import accumulate, over_devices
from jaxdyn.types import JaxdynError

ADAM = OptimConfig(eps=1e-3, weight_decay=0.1)
LOSSES = {
    "weighed": LossConfig("dapo", beta=0.1, importance=ImportanceConfig(1.05)),
    "sequences": LossConfig("gspo", importance=ImportanceConfig(1.05, "sequence")),
    "clip-cov": LossConfig(covariance=CovarianceConfig("clip", 0.3, (-9.0, 9.0))),
    "kl-cov": LossConfig("dapo", covariance=CovarianceConfig("kl", 0.3), beta=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_micro_batches_change_nothing(loss, x64):
    """The update's parameters and metrics, among which a maximum."""
    model, params = oracles.tiny_model("gpt_neox-untied")
    batch = tiny_batch()
    old = batch.old_per_token_logps
    batch = batch.replace(sampler_per_token_logps=old + 0.3 * jnp.sin(100 * old))
    if loss.covariance.control:
        given = old, batch.advantages, batch.completion_mask, jax.random.key(0)
        batch = batch.replace(held_back=held_back(loss.covariance, *given))
        assert 1 < batch.held_back.sum() < batch.completion_mask.sum()
    found = []
    for microbatches in (1, 2 if loss.covariance.control else 4):
        static = {"model": model, "loss": loss, "optim": ADAM, "microbatches": microbatches}
        numbers = jnp.float64(RATE), jnp.float64(TEMPERATURE)
        state, metrics = update(fresh(model, params, ADAM), {}, batch, None, *numbers, **static)
        found.append((state.params, metrics))
    for other in found[1:]:
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        jax.tree.map(close, other, found[0])
    apart = np.abs(old - batch.sampler_per_token_logps)[np.asarray(batch.completion_mask)]
    largest = found[1][1]["sampling/logp_difference/max"]
    np.testing.assert_allclose(largest, apart.max(), rtol=1e-12)


def test_maxima_are_joined_as_such():
    of_part = lambda x: {"a/max": x.max(), "a/mean": x.sum(), "b": {"max": x.sum()}}
    x = jnp.asarray([1.0, 5.0, 2.0, 3.0])
    assert accumulate(of_part, x, 2) == {"a/max": 5, "a/mean": 11, "b": {"max": 11}}
    everywhere = jax.vmap(lambda x: over_devices(of_part(x), "i"), axis_name="i")(x[:, None])
    assert {k: float(v[0]) for k, v in everywhere.items() if k != "b"} == {"a/max": 5, "a/mean": 11}


KINDS = {
    "compared": {},
    "weighed": {"loss__importance": ImportanceConfig(2.0)},
    "on-support": {
        "sampling__top_k": 5,
        "loss__importance": ImportanceConfig(2.0, "sequence", support=True),
    },
    "clip-cov": {"loss__covariance": CovarianceConfig("clip", 0.2, (-9.0, 9.0))},
    "kl-cov": {
        "train__num_iterations": 2,
        "train__microbatches": 2,
        "loss__covariance": CovarianceConfig("kl", 0.2),
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("expectations")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        *((kind, "joint") for kind in ("compared", "on-support", "clip-cov")),
        *((kind, "classifier_first") for kind in ("weighed", "kl-cov")),
    ],
)
def test_runs_say_how_far_the_sampler_was(root, kind, schedule):
    """Rounding in float32: a few dozen operations on log-probs of about 3."""
    changes = {"train__steps": 2, "train__checkpoint_every": 1, "optim__classifier_steps": 1}
    changes |= {"evaluation__every": 0, "probe__every": 0, "optim__schedule": schedule}
    run = run_rl(tiny_runs.rl_config(root, f"{kind}-{schedule}", **changes, **KINDS[kind]))
    lines = tiny_runs.lines(run, "metrics.jsonl")[1:]
    for line in lines:
        mean, largest = (line[f"sampling/logp_difference/{name}"] for name in ("mean", "max"))
        assert 0 <= mean <= largest < 1e-5
        if kind in ("weighed", "on-support"):
            assert line["sampling/importance_ratio/mean"] == pytest.approx(1, abs=1e-4)
            assert line["sampling/importance_ratio/capped"] == 0
        if "cov" in kind:
            assert line["covariance/held_back"] > 0
    with open_run(run) as saved:
        taken = saved.take(1).taken.metrics
    logged = lines[1]
    for name in taken:
        assert name not in logged or "time" in name or taken[name] == logged[name], name


@pytest.mark.slow
def test_weights_of_1_change_next_to_nothing(root):
    """A cap that is never reached and a sampler that agrees: the run of no weights."""
    changes = {"train__steps": 2, "evaluation__every": 0, "probe__every": 0}
    plain = tiny_runs.rl_config(root, "plain", **changes)
    weighed = tiny_runs.rl_config(root, "one", **changes, loss__importance=ImportanceConfig(9.0))
    one, two = (tiny_runs.lines(run_rl(c), "metrics.jsonl")[1:] for c in (plain, weighed))
    for a, b in zip(one, two, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_what_makes_no_sense_together_is_refused(root):
    with pytest.raises(JaxdynError, match=r"train.num_iterations must be at least 2, got 1"):
        tiny_runs.rl_config(root, "no", loss__covariance=CovarianceConfig("kl"))
    with pytest.raises(JaxdynError, match=r"^loss.importance.support needs sampling.top_k, top_p"):
        tiny_runs.rl_config(root, "no", loss__importance=ImportanceConfig(2.0, support=True))
