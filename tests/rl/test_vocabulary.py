"""Statistics in vocabulary chunks against the whole logits, in float64, and what they hold."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.rl import feature_statistics, vocabulary_chunk
from jaxdyn.rl.vocabulary import number_of_chunks

V, D = 37, 5


def logits_fn(classifier, features):
    """A classifier with everything a tree may hold: weight, bias and an adapter."""
    product = functools.partial(jnp.einsum, "...d,vd->...v")
    f = product(features, classifier["weight"])
    if "lora_a" in classifier:
        f = f + 0.5 * product(product(features, classifier["lora_a"]), classifier["lora_b"])
    if "bias" in classifier:
        f = f + classifier["bias"].reshape((1,) * (f.ndim - 1) + (-1,))
    return f


def problem(dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    classifier = {
        "weight": draw(V, D),
        "bias": draw(V),
        "lora_a": draw(3, D),
        "lora_b": draw(V, 3),
    }
    return classifier, draw(2, 4, D), jnp.asarray(rng.integers(0, V, (2, 4)))


def stacked(statistics):
    names = ("logps", "entropy", "max_prob", "margin")
    return jnp.stack([getattr(statistics, name) for name in names])


def whole(classifier, features, ids, temperature):
    """The same four from log-softmax of all logits and a sort."""
    log_probs = jax.nn.log_softmax(logits_fn(classifier, features) / temperature)
    largest = jnp.exp(jnp.sort(log_probs)[..., -2:])
    return jnp.stack(
        [
            jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0],
            -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1),
            largest[..., 1],
            largest[..., 1] - largest[..., 0],
        ]
    )


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, temperature, classifier, features):
    """The statistics [4, *B], and each one's gradient from a random cotangent."""
    values, pull = jax.vjp(functools.partial(function, temperature), classifier, features)
    draw = np.random.default_rng(1).normal(size=values.shape)
    each = np.eye(4).reshape((4, 4) + (1,) * (values.ndim - 1))
    return values, jax.vmap(pull)(jnp.asarray(each * draw, values.dtype))


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


# Values reach 10 and sums have 37 terms: rounding of 2^-53 of those stays below 1e-12.
@pytest.mark.parametrize("chunk", [1, 8, 36, 37])
def test_values_and_gradients_are_those_of_whole_logits(x64, chunk):
    classifier, features, ids = problem(jnp.float64)
    chunked = lambda t, c, phi: stacked(feature_statistics(logits_fn, c, phi, ids, t, chunk=chunk))
    plain = lambda t, c, phi: whole(c, phi, ids, t)
    for temperature in (0.0, 0.7):  # 0 is read as 1
        got = with_gradients(chunked, temperature, classifier, features)
        want = with_gradients(plain, temperature or 1.0, classifier, features)
        assert_trees_close(got, want, rtol=0, atol=1e-12)


def test_a_matrix_that_is_also_the_embedding_gets_both_gradients(x64):
    classifier, _, ids = problem(jnp.float64)
    embedding = classifier["weight"]
    head = lambda e: {"weight": e}
    chunked = lambda e: feature_statistics(logits_fn, head(e), jnp.tanh(e[ids]), ids, chunk=16)
    plain = lambda e: whole(head(e), jnp.tanh(e[ids]), ids, 1.0)
    got = jax.jit(jax.grad(lambda e: stacked(chunked(e)).sum()))(embedding)
    want = jax.jit(jax.grad(lambda e: plain(e).sum()))(embedding)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_under_checkpoint_and_a_scan_over_parts(x64):
    """As an update with rematerialisation and accumulation runs it."""
    classifier, features, ids = problem(jnp.float64)

    @jax.checkpoint
    def loss(classifier, features, ids):
        return stacked(feature_statistics(logits_fn, classifier, features, ids, chunk=16)).sum()

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(classifier, *part)), None

    zeros = jax.tree.map(jnp.zeros_like, classifier)
    got = jax.jit(lambda: jax.lax.scan(add, zeros, (features, ids)))()[0]
    want = jax.jit(jax.grad(lambda c: whole(c, features, ids, 1.0).sum()))(classifier)
    assert_trees_close(got, want, rtol=0, atol=1e-12)


def test_one_row_without_axes(x64):
    classifier, features, ids = problem(jnp.float64)
    one = jax.jit(functools.partial(feature_statistics, logits_fn, chunk=8))
    got = one(classifier, features[0, 0], ids[0, 0], 0.7)
    want = whole(classifier, features[0, 0], ids[0, 0], 0.7)
    np.testing.assert_allclose(stacked(got), want, rtol=0, atol=1e-12)


def test_bfloat16_compute_with_float32_weights():
    """Sums in float32, gradients in each leaf's dtype, every part of dφ rounded once.

    With r = 2^-8, bfloat16's rounding, and dz of the same logits in float64, dφ errs by at most
    r Σ_v |dz_v W_v| for its parts and the cotangent, and r |dφ| for the result; 2 r covers both.
    A row of dW comes from one chunk: one rounding of the sum.
    """
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    phi = jnp.asarray(rng.normal(size=(2, 4, D)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, V, (2, 4)))
    in_bfloat16 = lambda c, phi: jnp.einsum(
        "...d,vd->...v",
        phi,
        c["weight"].astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    total = lambda c, phi: feature_statistics(in_bfloat16, c, phi, ids, chunk=8).logps.sum()
    value, gradient = jax.jit(jax.value_and_grad(total, (0, 1)))({"weight": weight}, phi)
    assert gradient[0]["weight"].dtype == jnp.float32
    assert gradient[1].dtype == jnp.bfloat16

    rounded = np.asarray(weight.astype(jnp.bfloat16), np.float64)
    inputs = np.asarray(phi, np.float64)
    f = inputs @ rounded.T
    pi = np.exp(f - f.max(-1, keepdims=True))
    pi /= pi.sum(-1, keepdims=True)
    dz = np.eye(V)[np.asarray(ids)] - pi
    want = np.log(np.take_along_axis(pi, np.asarray(ids)[..., None], -1)).sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    step = 2.0**-8
    error = np.abs(np.asarray(gradient[1], np.float64) - dz @ rounded)
    assert (error <= 2 * step * (np.abs(dz) @ np.abs(rounded))).all()
    error = np.abs(gradient[0]["weight"] - np.einsum("btv,btd->vd", dz, inputs))
    assert (error <= 2 * step * np.einsum("btv,btd->vd", np.abs(dz), np.abs(inputs))).all()


@functools.partial(jax.jit, static_argnames="chunk")
def of_logits(f, y, chunk):
    """Statistics [4] of one row of logits, a classifier of width 1, and their Jacobian [4, V]."""
    row = lambda f: stacked(
        feature_statistics(
            lambda c, phi: phi @ c["weight"].T,
            {"weight": f[:, None]},
            jnp.ones((1, 1)),
            y[None],
            chunk=chunk,
        )
    )[:, 0]
    return row(f), jax.jacrev(row)(f)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("twins", [(0, 1), (1, 4)])
def test_a_tie_has_no_margin_within_and_across_chunks(chunk, twins):
    f = jnp.asarray([-1.0, 0.0, -3.0, 0.5, -2.0]).at[jnp.asarray(twins)].set(2.0)
    values, jacobian = of_logits(f, jnp.asarray(3), chunk)
    np.testing.assert_allclose(values[2], jax.nn.softmax(f).max(), rtol=1e-6)
    assert values[3] == 0
    assert jnp.isfinite(jacobian).all()


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_huge_logits_and_vanishing_probabilities(chunk):
    """Probability e^-30000 of the id: its log is exact, its gradient e_y - π, nothing is NaN."""
    values, jacobian = of_logits(jnp.asarray([3e4, 0.0, -3e4]), jnp.asarray(1), chunk)
    np.testing.assert_array_equal(values, [-3e4, 0, 1, 1])
    want = np.zeros((4, 3))
    want[0] = [-1, 1, 0]
    np.testing.assert_array_equal(jacobian, want)


@pytest.mark.parametrize("chunk", [2, 4])
def test_close_large_logits_keep_their_differences(chunk):
    """At 10⁴ float32 resolves 2^-10: those differences survive exactly, and so does softmax."""
    f = jnp.asarray([1e4, 1e4 + 2**-9, 1e4 - 0.5, 1e4 - 2.0])
    values, jacobian = of_logits(f, jnp.asarray(2), chunk)
    pi = np.exp([-(2.0**-9), 0, -0.5 - 2.0**-9, -2 - 2.0**-9])
    pi /= pi.sum()
    want = [np.log(pi[2]), -(pi * np.log(pi)).sum(), pi[1], pi[1] - pi[0]]
    np.testing.assert_allclose(values, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(jacobian[0], np.eye(4)[2] - pi, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [8, V])
def test_the_temperature_is_data(chunk):
    classifier, features, ids = problem(jnp.float32)
    total = lambda t: stacked(
        feature_statistics(logits_fn, classifier, features, ids, t, chunk=chunk)
    ).sum()
    assert jax.jit(jax.grad(total))(0.7) == 0


# -- what it costs, by the compiler's account -------------------------------------------------

ROWS, WIDTH, VOCAB, CHUNK = 1024, 256, 33000, 2048


def compiled(chunk, moving=("weight",), through_features=True):
    """Forward and backward pass of the mean log-probability with all metrics beside it."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    leaves = {"weight": shape(VOCAB, WIDTH)}
    if "lora_a" in moving:
        leaves |= {"lora_a": shape(4, WIDTH), "lora_b": shape(VOCAB, 4)}
    part = lambda keep: {name: x for name, x in leaves.items() if (name in moving) == keep}

    def loss(moves, phi, fixed, ids):
        found = feature_statistics(logits_fn, {**moves, **fixed}, phi, ids, chunk=chunk)
        return found.logps.mean(), stacked(found).mean(axis=(1, 2))

    gradient = jax.grad(loss, (0, 1) if through_features else 0, has_aux=True)
    ids = jax.ShapeDtypeStruct((16, ROWS // 16), jnp.int32)
    phi = shape(16, ROWS // 16, WIDTH)
    return jax.jit(gradient).lower(part(True), phi, part(False), ids).compile()


def test_memory_is_a_few_chunks_and_never_the_whole_logits():
    """Up to four arrays of a chunk's logits, dφ with its copies, and a slice of W and of dW."""
    size = 4
    bound = size * (4 * ROWS * CHUNK + 4 * ROWS * WIDTH + 4 * CHUNK * WIDTH)
    program = compiled(CHUNK)
    assert program.memory_analysis().temp_size_in_bytes <= bound
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest <= max(VOCAB * WIDTH, ROWS * VOCAB // 3)
    whole = compiled(VOCAB)
    assert whole.memory_analysis().temp_size_in_bytes >= size * ROWS * VOCAB > bound


@pytest.mark.parametrize(
    ("moving", "through_features", "products"),
    [
        (("weight",), True, 4),  # logits, logits again, dW, dφ
        (("weight",), False, 3),
        ((), True, 3),
        (("lora_a", "lora_b"), False, 2),
    ],
)
def test_what_does_not_move_costs_no_product(moving, through_features, products):
    """The compiler counts a loop's body once: products of one chunk, with some slack beside."""
    flops = compiled(CHUNK, moving, through_features).cost_analysis()["flops"]
    columns = VOCAB / number_of_chunks(VOCAB, CHUNK, 1)
    assert products <= flops / (2 * ROWS * WIDTH * columns) < products + 0.5


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("rows", [1, 100, 1024, 4096, 16384])
@pytest.mark.parametrize("vocab", [17, 2048, 50257, 50304, 151936])
def test_chunks_fit_their_target_are_even_and_few(rows, vocab, shards):
    most = vocabulary_chunk(rows, vocab)
    target = 64 * 2**20
    assert 4 * rows * most <= target
    if 4 * rows * vocab <= target:
        assert most == vocab
        return
    chunks = number_of_chunks(vocab, most, shards)
    fewest = math.ceil(vocab / (target // (4 * rows)))
    assert fewest <= chunks < 2 * fewest
    even = [n for n in range(fewest, 2 * fewest) if vocab % n == 0 and vocab // n % shards == 0]
    assert chunks == (even[0] if even else fewest)


def test_chunks_never_get_thin():
    assert vocabulary_chunk(10**6, 50257) == 1024
    assert vocabulary_chunk(10**6, 1000) == 1000
