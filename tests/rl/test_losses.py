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
    AdvantageConfig,
    LossConfig,
    Normalizer,
    ScoredBatch,
    aggregate,
    drop_truncated,
    estimate_advantages,
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
    "grpo dual clip": LossConfig(delta=1.25),
    "grpo dual clip inside": LossConfig(delta=1.1),
    "grpo token mean": LossConfig(beta=0.04, aggregation="token-mean"),
    "grpo kl in reward": LossConfig(beta=0.04, kl_placement="reward"),
    "grpo entropy": LossConfig(beta=0.04, entropy_coefficient=0.3),
    "dr_grpo": LossConfig(loss_type="dr_grpo", beta=0.04),
    "dapo": LossConfig(loss_type="dapo", beta=0.04),
    "bnpo": LossConfig(loss_type="bnpo", beta=0.04),
    "gspo": LossConfig(loss_type="gspo"),
    "gspo wide": LossConfig(loss_type="gspo", beta=0.04, epsilon=0.1, epsilon_high=0.15),
    "gspo dual clip": LossConfig(loss_type="gspo", epsilon=0.05, epsilon_high=0.05, delta=1.07),
    "cispo": LossConfig(loss_type="cispo", beta=0.04),
    "cispo capped": LossConfig(loss_type="cispo", epsilon_high=1.1),
    "rloo": LossConfig(loss_type="rloo"),
    "rloo k3 entropy": LossConfig(loss_type="rloo", beta=0.04, entropy_coefficient=0.3),
    "reinforce": LossConfig(loss_type="reinforce"),
    "reinforce k3": LossConfig(loss_type="reinforce", beta=0.04),
    "reinforce sequence mean": LossConfig(loss_type="reinforce", aggregation="seq-mean-token-mean"),
    "reinforce token mean": LossConfig(loss_type="reinforce", aggregation="token-mean"),
    "reinforce constant": LossConfig(loss_type="reinforce", aggregation="seq-mean-token-sum-norm"),
    "reinforce_plus_plus": LossConfig(loss_type="reinforce_plus_plus", beta=0.04),
    "ppo": LossConfig(loss_type="ppo"),
    "ppo dual clip": LossConfig(loss_type="ppo", beta=0.04, delta=1.3, entropy_coefficient=0.01),
}
every_loss = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

LONGEST = 8  # completion tokens, more than the arrays' slots
MEANS = {
    "grpo": "mean",
    "gspo": "mean",
    "dr_grpo": "constant",
    "rloo": "sum",
    "reinforce": "sum",
    "seq-mean-token-mean": "mean",
    "seq-mean-token-sum-norm": "constant",
}
CLIPS = {"dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4), "cispo": (0, 5.0)}


@functools.cache
def arrays(config=None, rows=6, slots=5):
    """New, old, reference log-probs, advantages, a ragged mask and entropies, in float64.

    Advantages are per token for the losses that take such.
    """
    rng = np.random.default_rng(3)
    new = -rng.exponential(1.5, (rows, slots))
    old, ref = (new + rng.normal(0, scale, (rows, slots)) for scale in (0.2, 0.5))
    lengths = 1 + np.arange(rows) % slots
    advantages, of_tokens = rng.normal(0, 1, rows), rng.normal(0, 1, (rows, slots))
    if config is not None and config.loss_type in ("ppo", "reinforce_plus_plus"):
        advantages = of_tokens
    mask = np.arange(slots)[None] < lengths[:, None]
    return new, old, ref, advantages, mask, rng.exponential(1, (rows, slots))


def by_hand(config, new, old, ref, advantages, mask, entropy, held=None):
    """The same losses as plain loops over sequences and tokens.

    `held` are the log-probs inside CISPO's stop_gradient, those of `new` when not given.
    """
    held = new if held is None else held
    low, high = CLIPS.get(config.loss_type, (0.8, 1.2))
    low = low if config.epsilon is None else 1 - config.epsilon
    if config.epsilon_high is not None:
        high = config.epsilon_high + (config.loss_type != "cispo")
    cap = np.inf if config.delta is None else config.delta
    clip = lambda ratio, a: -min(min(ratio, cap) * a, min(max(ratio, low), high) * a)
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
        log_ratio = sum(new[b, t] - old[b, t] for t in tokens)
        terms = []
        for t in tokens:
            a = advantages[b, t] if advantages.ndim == 2 else advantages[b]
            ratio = np.exp(new[b, t] - old[b, t])
            kl = estimators[config.kl_estimator](new[b, t] - ref[b, t])
            kl *= ratio if config.use_bias_correction_kl else 1
            weight = min(np.exp(held[b, t] - old[b, t]), high)
            term = {
                "reinforce": -a * new[b, t],
                "cispo": -weight * a * new[b, t],
                "gspo": clip(np.exp(log_ratio / len(tokens)), a),
                # one term a sequence, spread over its tokens
                "rloo": clip(np.exp(log_ratio), a) / len(tokens),
            }.get(config.loss_type, clip(ratio, a))
            terms.append(term + in_loss * kl)
        rows.append((sum(terms), len(tokens)))
    bonus = config.entropy_coefficient * entropy[mask].mean()
    kind = MEANS.get(config.aggregation or config.loss_type, "token")
    if kind == "token":
        return sum(total for total, _ in rows) / sum(count for _, count in rows) - bonus
    scale = {"mean": lambda n: n, "sum": lambda n: 1, "constant": lambda n: LONGEST}[kind]
    return sum(total / scale(count) for total, count in rows) / len(rows) - bonus


def value_and_grad(config, new, old, ref, advantages, mask, entropy=None, normalizer=None):
    old, ref, advantages, mask, entropy = jax.tree.map(
        jnp.asarray, (old, ref, advantages, mask, entropy)
    )
    counts = normalizer_of(mask, LONGEST) if normalizer is None else normalizer
    loss = lambda new: policy_loss(config, new, old, ref, advantages, mask, counts, entropy)
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
    new, old, ref = (jnp.asarray(data[name], jnp.float32) for name in ("new", "old", "ref"))
    mask = jnp.asarray(data["mask"], bool)
    advantages = jnp.asarray(case["advantages"], jnp.float32)
    counts = normalizer_of(mask, data["max_completion_length"])
    config = LossConfig(**case["config"])
    value, _, grad = value_and_grad(config, new, old, ref, advantages, mask, normalizer=counts)
    np.testing.assert_allclose(value, case["loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(grad, case["grad"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, case, config, loss",
    [
        ("trl", "grpo_b0", AdvantageConfig(), LossConfig()),
        ("tunix", "grpo_k1", AdvantageConfig(epsilon=1e-6), LossConfig()),
        ("tunix", "drgrpo", AdvantageConfig(), LossConfig(loss_type="dr_grpo")),
    ],
)
def test_advantages_are_those_of_trl_and_tunix(name, case, config, loss):
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    rewards = jnp.asarray(data["rewards"], jnp.float32)
    batch = ScoredBatch(rewards, jnp.ones(len(rewards), bool), jnp.asarray(data["mask"], bool))
    got, returns = estimate_advantages(config, loss, batch, data["num_generations"])
    np.testing.assert_allclose(got, data["cases"][case]["advantages"], rtol=0, atol=1e-6)
    assert returns is None


# -- the battery --------------------------------------------------------------------------------


def test_the_battery_covers_every_loss():
    assert {config.loss_type for config in CONFIGS.values()} == set(LOSSES)


@every_loss
def test_value_by_hand(config, x64):
    value, metrics, _ = value_and_grad(config, *arrays(config))
    np.testing.assert_allclose(value, by_hand(config, *arrays(config)), rtol=1e-12)
    penalty = (config.beta and config.kl_placement == "loss") or config.entropy_coefficient
    assert (value != metrics["policy_loss"]) == bool(penalty)


@every_loss
def test_gradient_by_finite_differences(config, x64):
    new, *rest = arrays(config)
    _, _, grad = value_and_grad(config, new, *rest)
    step = 1e-6  # truncation is O(step²), rounding O(1e-16 / step)
    for b, t in np.ndindex(new.shape):
        bump = np.zeros_like(new)
        bump[b, t] = step
        up, down = (by_hand(config, x, *rest, held=new) for x in (new + bump, new - bump))
        slope = up - down
        np.testing.assert_allclose(grad[b, t], slope / (2 * step), rtol=0, atol=2e-9)


@every_loss
def test_padding_changes_nothing_whatever_it_holds(config, x64):
    new, old, ref, advantages, mask, entropy = arrays(config)
    value, metrics, grad = value_and_grad(config, new, old, ref, advantages, mask, entropy)
    spare = ((0, 0), (2, 3))
    pad = lambda x: np.pad(np.where(mask, x, np.nan), spare, constant_values=np.nan)
    weights = pad(advantages) if advantages.ndim == 2 else advantages
    wide = value_and_grad(
        config, pad(new), pad(old), pad(ref), weights, np.pad(mask, spare), pad(entropy)
    )
    np.testing.assert_allclose(wide[0], value, rtol=1e-14)
    for name in metrics:
        np.testing.assert_allclose(wide[1][name], metrics[name], rtol=1e-14)
    np.testing.assert_allclose(wide[2], np.pad(grad, spare), rtol=1e-13, atol=0)


@every_loss
def test_micro_batches_add_up_to_the_batch(config, x64):
    """Values, metrics and gradients: of ragged, unequal micro-batches under the whole's counts."""
    whole = arrays(config)
    value, metrics, grad = value_and_grad(config, *whole)
    normalizer = normalizer_of(jnp.asarray(whole[4]), LONGEST)
    parts = [
        value_and_grad(config, *(x[rows] for x in whole), normalizer)
        for rows in (slice(0, 1), slice(1, 6))
    ]
    np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-13)
    for name in metrics:
        np.testing.assert_allclose(sum(part[1][name] for part in parts), metrics[name], rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), grad, rtol=1e-13)


@every_loss
def test_the_order_of_sequences_does_not_matter(config, x64):
    order = np.random.default_rng(0).permutation(6)
    value, _, grad = value_and_grad(config, *arrays(config))
    permuted, _, permuted_grad = value_and_grad(config, *(x[order] for x in arrays(config)))
    np.testing.assert_allclose(permuted, value, rtol=1e-13)
    np.testing.assert_allclose(permuted_grad, grad[order], rtol=1e-13)


@every_loss
def test_jit_changes_nothing_and_compiles_once(config, x64):
    jitted = jax.jit(functools.partial(value_and_grad, config))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15),
        jitted(*arrays(config)),
        value_and_grad(config, *arrays(config)),
    )
    new, old, ref, advantages, mask, entropy = arrays(config)
    jitted(old, new, ref, -advantages, mask[::-1].copy(), entropy)
    assert jitted._cache_size() == 1


@every_loss
def test_a_sequence_without_tokens_adds_nothing(config, x64):
    batch = [x.copy() for x in arrays(config)]
    counts = normalizer_of(jnp.asarray(batch[4]), LONGEST)
    batch[4][0] = False
    value, _, grad = value_and_grad(config, *batch, counts)
    rest = value_and_grad(config, *(x[1:] for x in batch), counts)
    np.testing.assert_allclose(value, rest[0], rtol=1e-13)
    assert (grad[0] == 0).all()


# -- what the parts mean ------------------------------------------------------------------------


def test_no_old_log_probs_means_ratio_one(x64):
    new, _, _, advantages, mask, _ = arrays()
    value, metrics, grad = value_and_grad(LossConfig(), new, None, None, advantages, mask)
    lengths = mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(value, -advantages.mean(), rtol=1e-13)
    np.testing.assert_allclose(
        grad, -np.where(mask, advantages[:, None], 0) / lengths / 6, rtol=1e-13
    )
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    assert "kl" not in metrics


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "ppo", "cispo", "gspo", "rloo"])
def test_clip_ratios_are_shares_of_tokens_or_of_sequences(name, x64):
    """However the loss averages, and however long a completion may be."""
    ratios = np.array([[1.5, 0.5, 1.1, 1.3], [1.5, 0.5, 0.7, 9.0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    advantages = np.array([1.0, -1.0])
    high = {"cispo": {"epsilon_high": 1.2}}.get(name, {})
    metrics = value_and_grad(
        LossConfig(loss_type=name, **high), np.log(ratios), 0 * ratios, None, advantages, mask
    )[1]
    # A > 0: 1.5 and 1.3 exceed 1.2. A < 0: 0.5 and 0.7 fall below 0.8. Of seven tokens.
    want = {"high": 2 / 7, "low": 2 / 7}
    if name == "cispo":  # caps whatever the advantage's sign
        want = {"high": 3 / 7}
    if name in ("gspo", "rloo"):  # the sequences' ratios are 1.0725 and 0.525, or their roots
        want = {"high": 1 / 2 if name == "gspo" else 0, "low": 1 / 2}
    got = {key: value for key, value in metrics.items() if key.startswith("clip_ratio/")}
    assert got.keys() == {f"clip_ratio/{side}_mean" for side in want}
    for side, share in want.items():
        np.testing.assert_allclose(got[f"clip_ratio/{side}_mean"], share, rtol=1e-14)


def test_only_ppo_learns_a_value_head():
    assert [name for name in LOSSES if LossConfig(loss_type=name).critic] == ["ppo"]


def test_kl_metric_is_the_mean_over_tokens(x64):
    new, old, ref, advantages, mask, _ = arrays()
    config = LossConfig(kl_estimator="k1")
    metrics = value_and_grad(config, new, old, ref, advantages, mask)[1]
    np.testing.assert_allclose(metrics["kl"], (new - ref)[mask].mean(), rtol=1e-13)


def test_kl_in_the_reward_by_hand(x64):
    _, old, ref, _, mask, _ = (jnp.asarray(x) for x in arrays())
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


# -- how losses clip and average ------------------------------------------------------------------


def test_every_loss_clips_as_published_unless_told():
    ranges = {name: LossConfig(loss_type=name).clip_range for name in LOSSES}
    assert ranges["grpo"] == ranges["ppo"] == ranges["dr_grpo"] == (0.8, 1.2)
    assert ranges["dapo"] == (0.8, 1.28)
    assert ranges["gspo"] == (1 - 3e-4, 1 + 4e-4)
    assert LossConfig(epsilon=0.1).clip_range == (0.9, 1.1)
    assert LossConfig(loss_type="dapo", epsilon=0.1).clip_range == (0.9, 1.28)
    assert LossConfig(loss_type="cispo").resolved_epsilon_high == 5.0


def test_a_dual_clip_bounds_what_a_negative_advantage_weighs(x64):
    """Above 1 + ε_high δ touches nothing but ratios above δ at A < 0 (Ye et al. 2020)."""
    new, mask = np.log([[0.5, 1.1, 1.9, 4.0]]), np.ones((1, 4), bool)
    config = LossConfig(delta=3.0)
    for advantage, weights in ((-2.0, [0.8, 1.1, 1.9, 3.0]), (2.0, [0.5, 1.1, 1.2, 1.2])):
        of = lambda config, a=advantage: value_and_grad(
            config, new, 0 * new, None, np.array([a]), mask
        )
        value, _, grad = of(config)
        np.testing.assert_allclose(value, -advantage * np.mean(weights), rtol=1e-14)
        without = np.array(of(LossConfig())[2])
        without[0, 3] = 0
        np.testing.assert_allclose(grad, without, rtol=1e-14)


def test_gspo_takes_an_advantage_a_token(x64):
    """Its token form: every token has the sequence's ratio and its own advantage."""
    new, old, _, _, mask, _ = arrays()
    weights = np.random.default_rng(8).normal(size=new.shape)
    config = LossConfig(loss_type="gspo", epsilon=0.9)
    _, _, grad = value_and_grad(config, new, old, None, weights, mask)
    lengths = mask.sum(axis=1, keepdims=True)
    ratio = np.exp(np.where(mask, new - old, 0).sum(axis=1, keepdims=True) / lengths)
    want = np.where(mask, -weights * ratio / lengths / 6, 0)
    assert (ratio < 1 + 4e-4).any()
    open_ = (ratio < 1 + 4e-4) | (weights < 0)
    np.testing.assert_allclose(grad, np.where(open_, want, 0), rtol=1e-13)


@pytest.mark.parametrize(
    "names, divide",
    [
        (["sequence-mean-token-mean", "seq-mean-token-mean", "grpo"], lambda n: n * 3),
        (["sequence-mean-token-sum", "seq-mean-token-sum"], lambda n: 3),
        (["token-mean", "bnpo", "dapo"], lambda n: 6),
        (
            [
                "sequence-mean-token-sum-norm",
                "seq-mean-token-sum-norm",
                "sequence-mean-token-scale",
                "dr_grpo",
            ],
            lambda n: 3 * LONGEST,
        ),
    ],
)
def test_aggregations_and_their_aliases_by_hand(names, divide, x64):
    x = np.arange(1.0, 13.0).reshape(3, 4)
    lengths = [3, 1, 2]
    mask = jnp.asarray(np.arange(4)[None] < np.array(lengths)[:, None])
    want = sum(x[b, t] / divide(n) for b, n in enumerate(lengths) for t in range(n))
    for name in names:
        got = aggregate(name, jnp.asarray(x), mask, normalizer_of(mask, LONGEST))
        np.testing.assert_allclose(got, want, rtol=1e-14)
        chosen = LossConfig(loss_type="reinforce", aggregation=name).resolved_aggregation
        assert chosen == names[0]


def test_an_unknown_aggregation_is_refused():
    mask = jnp.ones((1, 1), bool)
    with pytest.raises(JaxdynError, match=r"aggregation must be one of .*, got 'median'"):
        aggregate("median", jnp.ones((1, 1)), mask, normalizer_of(mask))


def test_normalizer_counts_sequences_and_tokens_and_knows_the_limit():
    mask = jnp.asarray([[True, True], [True, False], [False, False]])
    three = jnp.float32(3)
    assert normalizer_of(mask) == Normalizer(three, three, jnp.float32(2))
    assert normalizer_of(mask, 7) == Normalizer(three, three, jnp.float32(7))


def test_truncated_completions_have_no_loss_but_count_as_sequences(x64):
    new, old, _, advantages, mask, _ = arrays()
    finished = jnp.asarray([True, False, True, True, False, True])
    kept = drop_truncated(jnp.asarray(mask), finished)
    np.testing.assert_array_equal(kept, mask & np.asarray(finished)[:, None])
    value, _, grad = value_and_grad(LossConfig(), new, old, None, advantages, kept)
    some = np.array([0, 2, 3, 5])
    rest = value_and_grad(LossConfig(), new[some], old[some], None, advantages[some], mask[some])
    np.testing.assert_allclose(value, rest[0] * 4 / 6, rtol=1e-13)
    assert (grad[np.array([1, 4])] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_the_entropy_bonus_raises_entropy(loss_type, x64):
    """d loss / d entropy is -c times the weights of a mean over tokens, however a loss averages."""
    new, old, _, advantages, mask, entropy = map(jnp.asarray, arrays())
    config = LossConfig(loss_type=loss_type, entropy_coefficient=0.3)
    loss = lambda h: policy_loss(config, new, old, None, advantages, mask, None, h)[0]
    grad = jax.grad(loss)(jnp.where(mask, entropy, jnp.nan))
    np.testing.assert_allclose(grad, np.where(mask, -0.3 / mask.sum(), 0), rtol=1e-13)


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
        ({"loss_type": "ppo2"}, "loss_type must be one of .*'ppo2'"),
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"beta": float("nan")}, "beta must be finite, got nan"),
        ({"epsilon": 0.0}, r"epsilon must lie in \(0, 1\), got 0.0"),
        ({"epsilon": 1.5}, r"epsilon must lie in \(0, 1\), got 1.5"),
        ({"epsilon_high": -0.2}, "epsilon_high must be positive, got -0.2"),
        ({"delta": 1.0}, "delta must be above 1, got 1.0"),
        ({"delta": float("inf")}, "delta must be finite, got inf"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient must be at least 0, got -1.0"),
        ({"aggregation": "mean"}, "aggregation must be one of .*'mean'"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of .*'k4'"),
        ({"kl_placement": "both"}, "kl_placement must be one of .*'both'"),
        ({"kl_placement": "reward"}, "kl_placement is 'reward' but loss.beta is 0"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl needs a KL in the loss, got be"),
        (
            {"kl_placement": "reward", "beta": 0.1, "use_bias_correction_kl": True},
            "use_bias_correction_kl needs a KL in the loss, got beta 0.1 and kl_placement 'reward'",
        ),
        (
            {"loss_type": "rloo", "aggregation": "token-mean"},
            "aggregation must be 'sequence-mean-token-sum' for rloo, .*, got 'token-mean'",
        ),
        ({"loss_type": "gspo", "aggregation": "dapo"}, "aggregation must be .*, got 'dapo'"),
        ({"loss_type": "reinforce", "epsilon": 0.1}, "epsilon is of no use to reinforce, got 0.1"),
        ({"loss_type": "reinforce", "epsilon_high": 0.3}, "epsilon_high is of no use to reinforce"),
        ({"loss_type": "reinforce", "delta": 2.0}, "delta is of no use to reinforce, got 2.0"),
        ({"loss_type": "cispo", "epsilon": 0.1}, "epsilon is of no use to cispo, got 0.1"),
        ({"loss_type": "cispo", "delta": 3.0}, "delta is of no use to cispo, got 3.0"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high must be at least 1 .* 0.28"),
        ({"value_clip": 0.3}, "value_clip is of no use to grpo, got 0.3"),
        ({"value_clip": None}, "value_clip is of no use to grpo, got None"),
        ({"loss_type": "dapo", "value_coefficient": 1.0}, "value_coefficient is of no use to dapo"),
        ({"loss_type": "ppo", "value_clip": 0.0}, "value_clip must be positive, got 0.0"),
        ({"loss_type": "ppo", "value_coefficient": -0.1}, "value_coefficient must be at least 0"),
    ],
)
def test_nonsense_is_refused_by_name(fields, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(JaxdynError, match=rf"^loss\.{words}") as error:
        LossConfig(**fields)
    assert "\n" not in str(error.value)


ROW = jnp.zeros((1, 2)), None, None, jnp.ones(1), jnp.ones((1, 2), bool)


@pytest.mark.parametrize(
    "config, words",
    [
        (LossConfig(beta=0.1), "there are no reference log-prob"),
        (LossConfig(entropy_coefficient=0.1), "entropy_coefficient is 0.1 but there is no entropy"),
    ],
)
def test_what_a_config_asks_for_must_be_there(config, words):
    with pytest.raises(JaxdynError, match=words):
        policy_loss(config, *ROW)


def test_rloo_refuses_an_advantage_a_token():
    new, old, ref, _, mask = ROW
    with pytest.raises(JaxdynError, match=r"rloo takes one advantage a sequence, got \(1, 2\)"):
        policy_loss(LossConfig(loss_type="rloo"), new, old, ref, jnp.ones((1, 2)), mask)
