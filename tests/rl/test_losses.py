"""Losses against other libraries' values, hand-written loops, and the battery every loss passes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxdyn.rl import (
    LOSSES,
    LossConfig,
    Normalizer,
    group_relative,
    normalizer_of,
    penalised_rewards,
    policy_loss,
    token_statistics,
)
from jaxdyn.types import JaxdynError

GOLDEN = Path(__file__).parent / "golden"

CONFIGS = {
    "grpo": LossConfig(),
    "grpo k1": LossConfig(beta=0.04, kl_estimator="k1"),
    "grpo k2": LossConfig(beta=0.04, kl_estimator="k2"),
    "grpo k3": LossConfig(beta=0.04),
    "grpo k3 corrected": LossConfig(beta=0.04, use_bias_correction_kl=True),
    "grpo clip higher": LossConfig(epsilon=0.1, epsilon_high=0.28),
    "grpo token mean": LossConfig(beta=0.04, aggregation="token-mean"),
    "grpo kl in reward": LossConfig(beta=0.04, kl_placement="reward"),
    "rloo": LossConfig(loss_type="rloo"),
    "rloo k3": LossConfig(loss_type="rloo", beta=0.04),
    "reinforce": LossConfig(loss_type="reinforce"),
    "reinforce k3": LossConfig(loss_type="reinforce", beta=0.04),
    "reinforce sequence mean": LossConfig(
        loss_type="reinforce", aggregation="sequence-mean-token-mean"
    ),
    "reinforce token mean": LossConfig(loss_type="reinforce", aggregation="token-mean"),
}
every_loss = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@functools.cache
def arrays(rows=6, slots=5):
    """New, old, reference log-probs, advantages and a ragged mask, as float64 numpy arrays."""
    rng = np.random.default_rng(3)
    new = -rng.exponential(1.5, (rows, slots))
    old, ref = (new + rng.normal(0, scale, (rows, slots)) for scale in (0.2, 0.5))
    lengths = 1 + np.arange(rows) % slots
    return new, old, ref, rng.normal(0, 1, rows), np.arange(slots)[None] < lengths[:, None]


def by_hand(config, new, old, ref, advantages, mask):
    """The same losses as plain loops over sequences and tokens."""
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    clip = lambda ratio, a: -min(ratio * a, min(max(ratio, low), high) * a)
    estimators = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: np.exp(-d) + d - 1,
        None: lambda d: np.exp(-d) + d - 1,
    }
    in_loss = config.beta if config.kl_placement == "loss" else 0.0
    rows = []
    for b in range(len(new)):
        tokens = [t for t in range(new.shape[1]) if mask[b, t]]
        terms = []
        for t in tokens:
            ratio = np.exp(new[b, t] - old[b, t])
            kl = estimators[config.kl_estimator](new[b, t] - ref[b, t])
            kl *= ratio if config.use_bias_correction_kl else 1
            term = {
                "grpo": clip(ratio, advantages[b]),
                "reinforce": -advantages[b] * new[b, t],
                "rloo": 0.0,
            }[config.loss_type]
            terms.append(term + in_loss * kl)
        if config.loss_type == "rloo":
            log_ratio = sum(new[b, t] - old[b, t] for t in tokens)
            terms.append(clip(np.exp(log_ratio), advantages[b]))
        rows.append((sum(terms), len(tokens)))
    default = "mean" if config.loss_type == "grpo" else "sum"
    kind = {None: default, "sequence-mean-token-mean": "mean", "token-mean": "token"}
    if kind[config.aggregation] == "mean":
        return sum(total / count for total, count in rows) / len(rows)
    if kind[config.aggregation] == "sum":
        return sum(total for total, _ in rows) / len(rows)
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def value_and_grad(config, new, old, ref, advantages, mask, normalizer=None):
    old, ref, advantages, mask = jax.tree.map(jnp.asarray, (old, ref, advantages, mask))
    loss = lambda new: policy_loss(config, new, old, ref, advantages, mask, normalizer)
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(new))
    return value, metrics, grad


# -- against TRL and Tunix ----------------------------------------------------------------------


def golden_cases():
    for path in sorted(GOLDEN.glob("*.json")):
        data = json.loads(path.read_text())
        for name, case in data["cases"].items():
            yield pytest.param(data, case, id=f"{path.stem}-{name}")


@pytest.mark.parametrize("data, case", list(golden_cases()))
def test_values_and_gradients_are_those_of_trl_and_tunix(data, case):
    new, old, ref, advantages = (
        jnp.asarray(data[name], jnp.float32) for name in ("new", "old", "ref", "advantages")
    )
    mask = jnp.asarray(data["mask"], bool)
    config = LossConfig(**case["config"])
    value, _, grad = value_and_grad(config, new, old, ref, advantages, mask)
    np.testing.assert_allclose(value, case["loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(grad, case["grad"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, epsilon", [("trl", 1e-4), ("tunix", 1e-6)])
def test_advantages_are_those_of_trl_and_tunix(name, epsilon):
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    rewards = jnp.asarray(data["rewards"], jnp.float32)
    got = group_relative(rewards, data["num_generations"], epsilon=epsilon)
    np.testing.assert_allclose(got, data["advantages"], rtol=0, atol=1e-6)


# -- the battery --------------------------------------------------------------------------------


def test_the_battery_covers_every_loss():
    assert {config.loss_type for config in CONFIGS.values()} == set(LOSSES)


@every_loss
def test_value_by_hand(config, x64):
    value, metrics, _ = value_and_grad(config, *arrays())
    np.testing.assert_allclose(value, by_hand(config, *arrays()), rtol=1e-12)
    penalty = config.beta and config.kl_placement == "loss"
    assert (value != metrics["policy_loss"]) == bool(penalty)


@every_loss
def test_gradient_by_finite_differences(config, x64):
    new, *rest = arrays()
    _, _, grad = value_and_grad(config, new, *rest)
    step = 1e-6  # truncation is O(step²), rounding O(1e-16 / step)
    for b, t in np.ndindex(new.shape):
        bump = np.zeros_like(new)
        bump[b, t] = step
        slope = by_hand(config, new + bump, *rest) - by_hand(config, new - bump, *rest)
        np.testing.assert_allclose(grad[b, t], slope / (2 * step), rtol=0, atol=2e-9)


@every_loss
def test_padding_changes_nothing_whatever_it_holds(config, x64):
    new, old, ref, advantages, mask = arrays()
    value, metrics, grad = value_and_grad(config, new, old, ref, advantages, mask)
    spare = ((0, 0), (2, 3))
    pad = lambda x: np.pad(np.where(mask, x, np.nan), spare, constant_values=np.nan)
    wide = value_and_grad(config, pad(new), pad(old), pad(ref), advantages, np.pad(mask, spare))
    np.testing.assert_allclose(wide[0], value, rtol=1e-14)
    for name in metrics:
        np.testing.assert_allclose(wide[1][name], metrics[name], rtol=1e-14)
    np.testing.assert_allclose(wide[2], np.pad(grad, spare), rtol=1e-13, atol=0)


@every_loss
def test_micro_batches_add_up_to_the_batch(config, x64):
    """Values, metrics and gradients: of ragged, unequal micro-batches under the whole's counts."""
    whole = arrays()
    value, metrics, grad = value_and_grad(config, *whole)
    normalizer = normalizer_of(jnp.asarray(whole[-1]))
    parts = [
        value_and_grad(config, *(x[rows] for x in whole), normalizer)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-13)
    for name in metrics:
        np.testing.assert_allclose(sum(part[1][name] for part in parts), metrics[name], rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), grad, rtol=1e-13)


@every_loss
def test_the_order_of_sequences_does_not_matter(config, x64):
    order = np.random.default_rng(0).permutation(6)
    value, _, grad = value_and_grad(config, *arrays())
    permuted, _, permuted_grad = value_and_grad(config, *(x[order] for x in arrays()))
    np.testing.assert_allclose(permuted, value, rtol=1e-13)
    np.testing.assert_allclose(permuted_grad, grad[order], rtol=1e-13)


@every_loss
def test_jit_changes_nothing_and_compiles_once(config, x64):
    jitted = jax.jit(functools.partial(value_and_grad, config))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15),
        jitted(*arrays()),
        value_and_grad(config, *arrays()),
    )
    new, old, ref, advantages, mask = arrays()
    jitted(old, new, ref, -advantages, mask[::-1].copy())
    assert jitted._cache_size() == 1


@every_loss
def test_a_sequence_without_tokens_adds_nothing(config, x64):
    new, old, ref, advantages, mask = (x.copy() for x in arrays())
    counts = normalizer_of(jnp.asarray(mask))
    mask[0] = False
    value, _, grad = value_and_grad(config, new, old, ref, advantages, mask, counts)
    rest = value_and_grad(config, *(x[1:] for x in (new, old, ref, advantages, mask)), counts)
    np.testing.assert_allclose(value, rest[0], rtol=1e-13)
    assert (grad[0] == 0).all()


# -- what the parts mean ------------------------------------------------------------------------


def test_no_old_log_probs_means_ratio_one(x64):
    new, _, _, advantages, mask = arrays()
    value, metrics, grad = value_and_grad(LossConfig(), new, None, None, advantages, mask)
    lengths = mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(value, -advantages.mean(), rtol=1e-13)
    np.testing.assert_allclose(
        grad, -np.where(mask, advantages[:, None], 0) / lengths / 6, rtol=1e-13
    )
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    assert "kl" not in metrics


def test_clip_ratios_count_where_a_bound_took_effect(x64):
    old = np.zeros((2, 4))
    new = np.log([[1.5, 0.5, 1.1, 1.3], [1.5, 0.5, 0.7, 9.0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    advantages = np.array([1.0, -1.0])
    metrics = value_and_grad(LossConfig(), new, old, None, advantages, mask)[1]
    # A > 0: 1.5 and 1.3 exceed 1.2, two of four. A < 0: 0.5 and 0.7 fall below 0.8, two of three.
    np.testing.assert_allclose(metrics["clip_ratio/high_mean"], (2 / 4) / 2, rtol=1e-14)
    np.testing.assert_allclose(metrics["clip_ratio/low_mean"], (2 / 3) / 2, rtol=1e-14)


def test_kl_metric_is_the_mean_over_tokens(x64):
    new, old, ref, advantages, mask = arrays()
    config = LossConfig(kl_estimator="k1")
    metrics = value_and_grad(config, new, old, ref, advantages, mask)[1]
    np.testing.assert_allclose(metrics["kl"], (new - ref)[mask].mean(), rtol=1e-13)


def test_kl_in_the_reward_by_hand(x64):
    _, old, ref, _, mask = (jnp.asarray(x) for x in arrays())
    rewards = jnp.arange(6.0).at[2].set(jnp.nan)
    got = penalised_rewards(rewards, 0.1, "k1", jnp.where(mask, old, jnp.nan), ref, mask)
    want = [
        rewards[b] - 0.1 * sum(float(old[b, t] - ref[b, t]) for t in range(5) if mask[b, t])
        for b in range(6)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert np.isnan(got[2])


def test_kl_estimator_follows_its_placement():
    assert LossConfig(beta=0.1).resolved_kl_estimator == "k3"
    assert LossConfig(beta=0.1, kl_placement="reward").resolved_kl_estimator == "k1"
    chosen = LossConfig(beta=0.1, kl_placement="reward", kl_estimator="k2")
    assert chosen.resolved_kl_estimator == "k2"


# -- exact expectations over the policy at a one-token site ---------------------------------------


def expected_gradient(loss_of_token, logits):
    """E_{y ~ π}[d loss(y) / d f], summed over the whole vocabulary."""
    probs = jax.nn.softmax(logits)
    grads = jax.vmap(lambda y: jax.grad(loss_of_token, argnums=1)(y, logits))
    return jnp.einsum("y,yv->v", probs, grads(jnp.arange(logits.size)))


def site_loss(config, advantages, ref_logits=None):
    """The loss of sampling token y at one site, through the logits."""

    def loss(y, logits):
        logp = lambda f: token_statistics(f[None, None], y[None, None]).logps
        ref = None if ref_logits is None else logp(ref_logits)
        mask = jnp.ones((1, 1), bool)
        return policy_loss(config, logp(logits), None, ref, advantages[y][None], mask)[0]

    return loss


@pytest.fixture
def site(x64):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(0, 1.5, 9)) for _ in range(3)]  # logits, reference, advantages


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_expected_update_is_pi_times_centred_advantage(loss_type, site):
    """E_y[A(y) (e_y - π)] = π ⊙ (A - πᵀA)."""
    logits, _, advantages = site
    got = -expected_gradient(site_loss(LossConfig(loss_type=loss_type), advantages), logits)
    probs = jax.nn.softmax(logits)
    np.testing.assert_allclose(got, probs * (advantages - probs @ advantages), atol=1e-15)


def forward_kl(logits, ref):
    """KL(π ‖ π_ref)."""
    return jax.nn.softmax(logits) @ (jax.nn.log_softmax(logits) - jax.nn.log_softmax(ref))


@pytest.mark.parametrize(
    "config, divergence",
    [
        (LossConfig(beta=1.0, kl_estimator="k1"), lambda f, ref: 0.0 * f.sum()),
        (LossConfig(beta=1.0, kl_estimator="k2"), forward_kl),
        (LossConfig(beta=1.0, kl_estimator="k3"), lambda f, ref: forward_kl(ref, f)),
        (LossConfig(beta=1.0, kl_estimator="k3", use_bias_correction_kl=True), forward_kl),
    ],
    ids=["k1", "k2", "k3", "k3 corrected"],
)
def test_expected_gradient_of_the_kl_in_the_loss(config, divergence, site):
    logits, ref, _ = site
    got = expected_gradient(site_loss(config, jnp.zeros(9), ref), logits)
    np.testing.assert_allclose(got, jax.grad(divergence)(logits, ref), atol=1e-14)


def test_expected_gradient_of_k1_in_the_reward_is_that_of_the_kl(site):
    logits, ref, _ = site
    logp, ref_logp = (jax.nn.log_softmax(f)[:, None] for f in (logits, ref))
    mask = jnp.ones((9, 1), bool)
    advantages = penalised_rewards(jnp.zeros(9), 1.0, "k1", logp, ref_logp, mask)
    got = expected_gradient(site_loss(LossConfig(), advantages), logits)
    np.testing.assert_allclose(got, jax.grad(forward_kl)(logits, ref), atol=1e-14)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"loss_type": "ppo"}, "loss_type must be one of .*'ppo'"),
        ({"beta": -0.1}, "beta must be 0 or more, got -0.1"),
        ({"beta": float("nan")}, "beta must be 0 or more, got nan"),
        ({"epsilon": 0.0}, "epsilon must lie between 0 and 1, got 0.0"),
        ({"epsilon": 1.5}, "epsilon must lie between 0 and 1, got 1.5"),
        ({"epsilon_high": -0.2}, "epsilon_high must be above 0, got -0.2"),
        ({"aggregation": "mean"}, "aggregation must be one of .*'mean'"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of .*'k4'"),
        ({"kl_placement": "both"}, "kl_placement must be one of .*'both'"),
        ({"kl_placement": "reward"}, "kl_placement is 'reward' but beta is 0"),
        (
            {"kl_placement": "reward", "beta": 0.1, "use_bias_correction_kl": True},
            "use_bias_correction_kl needs kl_placement 'loss'",
        ),
        ({"loss_type": "rloo", "aggregation": "token-mean"}, "rloo weighs whole sequences"),
    ],
)
def test_nonsense_is_refused_by_name(fields, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(JaxdynError, match=words) as error:
        LossConfig(**fields)
    assert "\n" not in str(error.value)


def test_beta_without_a_reference_is_refused():
    row = jnp.zeros((1, 2))
    with pytest.raises(JaxdynError, match="there are no reference log-prob"):
        policy_loss(LossConfig(beta=0.1), row, None, None, jnp.ones(1), jnp.ones((1, 2), bool))


def test_normalizer_counts_sequences_and_tokens():
    mask = jnp.asarray([[True, True], [True, False], [False, False]])
    assert normalizer_of(mask) == Normalizer(jnp.float32(3), jnp.float32(3))
