"""Tokens drawn: which ones can be, how often, and what is recorded about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdyn.rollout import sample_token
from jaxdyn.rollout.sampling import block_width, categorical, filtered

KEY = jax.random.key(0)


def numpy_support(logits, top_k, top_p):
    """Which tokens remain, by sorting: the k likeliest, then of those the nucleus."""
    support = np.zeros(logits.shape, bool)
    for row, f in enumerate(np.asarray(logits, np.float64)):
        order = np.argsort(-f)[: top_k if top_k else None]
        probs = np.exp(f[order] - f[order[0]])
        probs /= probs.sum()
        before = np.cumsum(probs) - probs
        support[row, order[before < top_p] if top_p < 1 else order] = True
    return support


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, key=KEY):
    args = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p))
    return jax.jit(sample_token)(key, logits, *map(jnp.asarray, args))


# A sum of V probabilities in float32 errs by at most V * 2^-24: the nucleus found must lie between
# the exact ones of a probability smaller and larger by that.
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.05])
@pytest.mark.parametrize(
    "top_k, size", [(0, 41), (1, 41), (7, 41), (41, 41), (1000, 41), (9, 9000)]
)
def test_filters_keep_what_a_sort_keeps(top_k, size, top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (8, size)), jnp.float32)
    got = filtered(logits, jnp.int32(top_k), jnp.float32(top_p))
    kept = np.isfinite(got)
    error = size * 2.0**-24 if top_p < 1 else 0
    assert (kept >= numpy_support(logits, top_k, top_p - error)).all()
    assert (kept <= numpy_support(logits, top_k, top_p + error)).all()
    np.testing.assert_array_equal(np.asarray(got)[kept], np.asarray(logits)[kept])


def test_nucleus_of_a_large_vocabulary():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (2, 50_000)), jnp.float32)
    kept = np.isfinite(filtered(logits, jnp.int32(0), jnp.float32(0.9)))
    error = 50_000 * 2.0**-24
    assert (kept >= numpy_support(logits, 0, 0.9 - error)).all()
    assert (kept <= numpy_support(logits, 0, 0.9 + error)).all()


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    got = filtered(logits, jnp.int32(2), jnp.float32(1.0))
    np.testing.assert_array_equal(np.isfinite(got[0]), [True, True, True, False])


WIDE = {
    "one masked by -1e30": [-1e30, 1.0, 1.0 + 2**-20, 0.5],
    "all but two masked": [-1e30, -1e30, 3.0, 3.0 + 2**-20],
    "masked by -inf": [-np.inf, 0.25, 0.5, -np.inf],
    "all but two -inf": [-np.inf, -np.inf, -1e-30, 1e-30],
    "of every size": [-1e38, -1.0, -1e-37, 0.0, 1e-37, 1e-20, 1.0, 3e38],
    "next to each other": [1.0, 1.0 + 2**-23, 1.0 + 2**-22, -3e38],
    "both zeros": [-0.0, 0.0, -1.0, 1.0],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", WIDE)
def test_the_kth_largest_logit_is_found_whatever_the_range(name, dtype, x64):
    """Against a sort; ties with the last are kept."""
    f = np.array(WIDE[name], dtype)
    for k in range(1, len(f) + 1):
        got = jax.jit(filtered)(jnp.asarray(f)[None], jnp.int32(k), jnp.float32(1.0))[0]
        expected = np.where(f >= np.sort(f)[-k], f, -np.inf)
        np.testing.assert_array_equal(got, expected, err_msg=f"k = {k}")


def test_the_nucleus_is_found_beside_masked_tokens():
    logits = jnp.log(jnp.asarray([[0.0, 0.5, 0.3, 0.2, 0.0]])).at[0, 4].set(-1e30)
    for top_p, kept in ((0.4, [1]), (0.7, [1, 2]), (0.9, [1, 2, 3])):
        got = filtered(logits, jnp.int32(0), jnp.float32(top_p))[0]
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(got)), kept)


def test_equal_logits_survive_every_filter():
    logits = jnp.zeros((1, 5))
    assert np.isfinite(filtered(logits, jnp.int32(2), jnp.float32(0.3))).all()


# 1 - 1e-6 of the chi-square distribution: under a fixed key the test is deterministic, and over
# keys a correct sampler fails one time in a million.
@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.5, 4, 1.0, 0.0),
        (1.3, 6, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (2.0, 0, 1.0, 0.2),
        (1.3, 6, 0.8, 0.3),
    ],
)
def test_frequencies_are_those_of_the_filtered_policy(temperature, top_k, top_p, min_p):
    f = np.random.default_rng(2).normal(0, 1, 9)
    count = 20_000
    rows = jnp.asarray(np.tile(f, (count, 1)), jnp.float32)
    tokens, _ = draw(rows, temperature, top_k, top_p, min_p)
    support = numpy_support(f[None] / temperature, top_k, top_p)[0]
    support &= np.exp((f - f.max()) / temperature) >= min_p
    assert support.sum() > 1 and (support.all() == (top_k == min_p == 0))
    probs = np.where(support, np.exp(f / temperature), 0)
    expected = count * probs / probs.sum()
    observed = np.bincount(tokens, minlength=9)
    assert (observed[~support] == 0).all()
    chi_square = ((observed - expected)[support] ** 2 / expected[support]).sum()
    assert chi_square < stats.chi2.ppf(1 - 1e-6, support.sum() - 1)


# Sizes on both sides of a full block, one that fills them all, and a single token.
@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 100])
def test_a_grid_of_uniforms_draws_every_index_as_often_as_its_mass_says(size):
    """n² equally likely pairs of uniforms: each count is right to the grid's two spacings."""
    n = 500
    mass = np.random.default_rng(5).exponential(size=size) ** 2
    mass[1::3] = 0
    grid = (np.arange(n) + 0.5) / n
    uniforms = jnp.asarray(np.stack(np.meshgrid(grid, grid)).reshape(2, -1), jnp.float32)
    rows = jnp.broadcast_to(jnp.asarray(mass, jnp.float32), (n * n, size))
    share = np.bincount(jax.jit(categorical)(uniforms, rows), minlength=size) / n**2
    np.testing.assert_allclose(share, mass / mass.sum(), rtol=0, atol=2 / n)
    assert (share[mass == 0] == 0).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-23])
def test_the_ends_of_the_uniforms_draw_the_first_and_the_last_token_with_mass(uniform):
    generator = np.random.default_rng(6)
    mass = generator.exponential(size=(64, 3000)) * (generator.random((64, 3000)) < 0.01)
    token = jax.jit(categorical)(jnp.full((2, 64), uniform), jnp.asarray(mass, jnp.float32))
    places = [np.flatnonzero(row) for row in mass]
    np.testing.assert_array_equal(token, [p[-1 if uniform else 0] for p in places])


def test_frequencies_in_a_large_vocabulary():
    """2000 tokens of every rarity, against the float64 softmax; rare ones are counted together."""
    f = 2 * np.random.default_rng(7).normal(size=2000)
    rows, repeats = 2000, 50
    logits = jnp.asarray(np.tile(f, (rows, 1)), jnp.float32)
    tokens = [draw(logits, key=jax.random.key(i))[0] for i in range(repeats)]
    observed = np.bincount(np.concatenate(tokens), minlength=f.size)
    expected = rows * repeats * np.exp(f) / np.exp(f).sum()
    rare = expected < 10
    assert 100 < rare.sum() < 1900 and expected[rare].sum() > 100
    together = lambda x: np.append(x[~rare], x[rare].sum())
    observed, expected = together(observed), together(expected)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < stats.chi2.ppf(1 - 1e-6, len(expected) - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probs_ignore_the_filters(temperature):
    f = np.random.default_rng(3).normal(0, 2, (16, 30))
    for filters in ((0, 1.0), (3, 0.7), (0, 1.0, 0.3)):
        tokens, logps = draw(jnp.asarray(f, jnp.float32), temperature, *filters)
        scaled = f / temperature
        want = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(logps, want[np.arange(16), tokens], rtol=0, atol=1e-5)


def test_temperature_zero_is_greedy_with_log_probs_at_temperature_one():
    f = np.random.default_rng(4).normal(0, 0.01, (16, 30))
    tokens, logps = draw(
        jnp.asarray(f, jnp.float32), temperature=0.0, top_k=2, top_p=0.4, min_p=1.0
    )
    np.testing.assert_array_equal(tokens, f.argmax(axis=1))
    want = f.max(axis=1) - np.log(np.exp(f).sum(axis=1))
    np.testing.assert_allclose(logps, want, rtol=0, atol=1e-6)


def test_rows_draw_independently():
    """Two rows agree as often as two independent draws do: 1/V within five standard errors."""
    tokens, _ = draw(jnp.zeros((20_000, 4)))
    agree = np.mean(tokens[0::2] == tokens[1::2])
    assert abs(agree - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 10_000)


@pytest.mark.parametrize(
    ("size", "width"),
    [(20, 8), (512, 32), (4096, 64), (3144, 24), (50304, 131), (128256, 501), (50257, 256)],
)
def test_blocks_of_a_large_vocabulary_leave_no_rest_where_they_can(size, width):
    assert block_width(size) == width
    assert size % width == 0 or size < 1024 or size == 50257  # 50257 = 29 x 1733


def test_a_block_and_then_a_place_in_it():
    """By two inversions of the CDF in float64, for blocks whose width is no power of two."""
    rng = np.random.default_rng(0)
    mass = rng.exponential(size=(64, 3144)).astype(np.float32)
    uniforms = rng.uniform(size=(2, 64)).astype(np.float32)
    drawn = np.asarray(categorical(jnp.asarray(uniforms), jnp.asarray(mass)))
    blocks = mass.astype(np.float64).reshape(64, -1, 24)
    share = lambda x, v: np.cumsum(x)[[v - 1, v]] * [v > 0, 1] / x.sum()
    for row, token in enumerate(drawn):
        block, place = divmod(int(token), 24)
        for u, (low, high) in (
            (uniforms[0, row], share(blocks[row].sum(axis=1), block)),
            (uniforms[1, row], share(blocks[row, block], place)),
        ):
            assert low - 1e-5 <= u <= high + 1e-5
