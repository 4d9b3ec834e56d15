"""The full pass's attention: exact, finite, half computed, and not kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.distributed import make_mesh, shard_model
from jaxdyn.models import LanguageModel, fused
from jaxdyn.models import attention as module
from jaxdyn.models.attention import attention, plain_attention
from jaxdyn.models.fused import cudnn_can, splash, splash_can
from jaxdyn.models.shapes import SHAPES
from jaxdyn.models.visibility import Seen
from jaxdyn.sections import MeshConfig

B, HEADS, WIDTH = 3, 4, 8


def draw(slots, kv_heads, dtype):
    """Queries, keys, values, and the mask of rows padded on the left, on the right, not at all."""
    rng = np.random.default_rng(0)
    shapes = [(B, slots, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    inputs = tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    tokens = np.ones((B, slots), bool)
    tokens[0, : slots // 3], tokens[1, -slots // 3 :] = False, False
    causal = np.tril(np.ones((slots, slots), bool))
    return inputs, jnp.asarray(causal[None, None] & tokens[:, None, None, :])


def in_numpy(query, key, value, mask):
    groups = HEADS // key.shape[2]
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    scores = np.einsum("bthw,bkhw->bhtk", query, key) / np.sqrt(WIDTH)
    weights = np.where(mask, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhtk,bkhw->bthw", weights / np.where(total, total, 1), value)


def seen(mask):
    """Queries that see a token; nobody reads the others' answers."""
    return np.asarray(mask).any(-1)[:, 0, :, None, None]


# One part of the queries, two uneven ones, and four; two of which each goes in five blocks.
@pytest.mark.parametrize("slots, block", [(6, 256), (131, 256), (256, 256), (131, 16)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_exact_in_float64(slots, block, kv_heads, x64, monkeypatch):
    """Values against numpy, gradients against those of one block that keeps its weights."""
    monkeypatch.setattr(module, "BLOCK", block)
    inputs, mask = draw(slots, kv_heads, jnp.float64)
    attention = lambda *given: module.attention(*given)  # of one block size, traced alone
    got = jax.jit(attention)(*inputs, mask)
    assert got.dtype == jnp.float64
    expected = in_numpy(*map(np.asarray, inputs), np.asarray(mask))
    np.testing.assert_allclose(np.where(seen(mask), got, 0), expected, atol=1e-13)

    cotangent = np.random.default_rng(1).standard_normal(got.shape) * seen(mask)
    pull = lambda function: jax.jit(jax.grad(lambda x: jnp.sum(function(*x, mask) * cotangent)))(
        inputs
    )
    for ours, plain in zip(pull(attention), pull(plain_attention), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_rounds_no_more_than_its_dtype_must(dtype):
    """In bfloat16 weights and result are rounded once each, to u = 2^-8, and the sums are float32.

    An average of values below 5 then errs by at most 2 u · 5; in float32 the scores' own rounding
    counts too: below 10 in size, of a few roundings each.
    """
    inputs, mask = draw(131, 2, dtype)
    got = jax.jit(attention)(*inputs, mask)
    assert got.dtype == dtype
    exact = in_numpy(*(np.asarray(x, np.float64) for x in inputs), np.asarray(mask))
    error = np.abs(np.asarray(got, np.float64) - exact) * seen(mask)
    u = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24
    bound = 2 * u * 5 if dtype == jnp.bfloat16 else 5 * (2 * 4 * 10 * u)
    assert u / 4 < error.max() < bound


def test_gradients_of_keys_are_summed_in_float32(monkeypatch):
    """Of 64 blocks, each one's part rounded to bfloat16, as the whole is that of one block."""
    inputs, mask = draw(256, 1, jnp.bfloat16)
    cotangent = np.random.default_rng(1).standard_normal(inputs[0].shape)

    def pulled(function, inputs, mask):
        loss = lambda key: jnp.sum(function(inputs[0], key, inputs[2], mask) * cotangent)
        return jax.jit(jax.grad(loss))(inputs[1])

    exact = np.asarray(pulled(plain_attention, [x.astype(jnp.float32) for x in inputs], mask))

    def error(block):
        monkeypatch.setattr(module, "BLOCK", block)
        found = pulled(lambda *given: module.attention(*given), inputs, mask)
        return np.linalg.norm(np.asarray(found, np.float32) - exact) / np.linalg.norm(exact)

    assert error(4) < 1.1 * error(256) < 2.0**-7


def test_forward_mode_at_long_contexts_is_in_blocks():
    """By the compiler's account: of T x T weights the blocks of each quarter, four arrays each."""
    heads, slots = 2, 4096
    shape = jax.ShapeDtypeStruct((1, slots, heads, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, slots, slots), bool)
    along = lambda *x, mask: jax.jvp(lambda *x: attention(*x, mask), x, x)
    compiled = jax.jit(along).lower(shape, shape, shape, mask=mask).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    quarters = (1 + 2 + 3 + 4) / 4
    assert needed < 4 * 4 * heads * slots * module.BLOCK * quarters < 4 * heads * slots**2


@pytest.mark.parametrize("slots", [6, 131])
def test_queries_that_see_nothing_are_finite_and_so_are_their_gradients(slots):
    inputs, mask = draw(slots, 2, jnp.float32)
    assert not seen(mask).all()
    loss = lambda x: jnp.sum(attention(*x, mask) ** 2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(inputs)
    assert all(np.isfinite(x).all() for x in (value, *gradient))


def test_what_the_mask_hides_is_mostly_not_computed():
    """Four blocks of queries meet (1 + 2 + 3 + 4) / 16 of the keys."""
    inputs, mask = draw(256, 4, jnp.float32)
    flops = lambda f: jax.jit(f).lower(*inputs, mask).compile().cost_analysis()["flops"]
    assert 0.6 < flops(attention) / flops(plain_attention) < 0.65


def test_the_weights_are_not_kept_for_the_backward_pass():
    inputs, mask = draw(256, 4, jnp.float32)
    kept = lambda function: jax.eval_shape(
        lambda x: jax.vjp(lambda x: function(*x, mask), x)[1], inputs
    )
    largest = lambda function: max(
        x.size for x in jax.tree.leaves(kept(function)) if x.dtype == jnp.float32
    )
    assert largest(plain_attention) == B * HEADS * 256**2
    assert largest(attention) <= B * 256 * HEADS * WIDTH


@pytest.mark.parametrize(
    ("dtype", "shape", "fits"),
    [
        (jnp.bfloat16, (2, 64, 4, 64), True),
        (jnp.float16, (2, 64, 4, 128), True),
        (jnp.float32, (2, 64, 4, 64), False),
        (jnp.bfloat16, (2, 63, 4, 64), False),
        (jnp.bfloat16, (2, 64, 4, 20), False),
        (jnp.bfloat16, (2, 64, 4, 256), False),
    ],
)
def test_cudnn_takes_half_precision(dtype, shape, fits, monkeypatch):
    """Lowered for CUDA without a card: the program calls cuDNN's kernels, both ways, or none."""
    assert cudnn_can(dtype, shape) == fits
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # What jax asks of the machine that traces.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: False, raising=False)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False, raising=False)
    x = jax.ShapeDtypeStruct(shape, dtype)
    mask = jax.ShapeDtypeStruct((shape[0], 1, shape[1], shape[1]), bool)
    loss = lambda q, k, v, mask: jnp.sum(attention(q, k, v, mask, "cudnn").astype(jnp.float32))
    traced = jax.jit(jax.value_and_grad(loss)).trace(x, x, x, mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("__cudnn$fmhaScaleBiasSoftmax" in text) == fits
    assert ("__cudnn$fmhaScaleBiasSoftmaxBackward" in text) == fits
    # Rows of a prompt and two completions: once for the prompts, once for the completions.
    prompts, third = shape[0], 20
    ones = lambda *shape: jax.ShapeDtypeStruct(shape, bool)
    mask = Seen(ones(prompts, 1, third, third), ones(prompts, 2, third, 2 * third))
    row = jax.ShapeDtypeStruct((prompts, 3 * third, *shape[2:]), dtype)
    text = jax.jit(loss).trace(row, row, row, mask).lower(lowering_platforms=("cuda",)).as_text()
    kernels = text.count("custom_call @__cudnn$fmhaScaleBiasSoftmax(")
    assert kernels == 2 * cudnn_can(dtype, row.shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_splash_kernel_rounds_as_the_plain_one(dtype):
    """Run by Pallas's interpreter on padded slots, both ways: its error is that of the dtype.

    In float32 the row without padding holds two sequences.
    """
    inputs, mask = draw(140, 2, dtype)
    if dtype == jnp.float32:
        mask = mask.at[2, 0, 60:, :60].set(False)
    tokens = np.diagonal(mask[:, 0], axis1=1, axis2=2)[:, :, None, None]
    cotangent = np.random.default_rng(1).standard_normal(inputs[0].shape)

    def both(function, inputs):
        def loss(inputs):
            mixed = function(*inputs, mask)
            return jnp.sum(jnp.where(tokens, mixed, 0) * cotangent), mixed

        gradient, mixed = jax.jit(jax.grad(loss, has_aux=True))(inputs)
        return [np.asarray(x, np.float32) for x in (jnp.where(tokens, mixed, 0), *gradient)]

    exact = both(plain_attention, tuple(x.astype(jnp.float32) for x in inputs))
    found = both(lambda *given: splash(*given, interpret=True), inputs)
    norm = np.linalg.norm
    errors = [norm(x - y) / norm(y) for x, y in zip(found, exact, strict=True)]
    u = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24
    assert u / 4 < max(errors) < (2 * u if dtype == jnp.bfloat16 else 64 * u)


def test_the_splash_kernel_is_taken_at_long_contexts():
    """Forward, and backward two, lowered for a TPU; of fewer slots the plain one."""
    loss = lambda q, k, v, mask: jnp.sum(attention(q, k, v, mask, "splash").astype(jnp.float32))

    def kernels(slots, dtype):
        x = jax.ShapeDtypeStruct((1, slots, 2, 64), dtype)
        mask = jax.ShapeDtypeStruct((1, 1, slots, slots), bool)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x, mask)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert kernels(1024, jnp.bfloat16) == 3 and kernels(1023, jnp.bfloat16) == 0
    assert splash_can(jnp.float32, (1, 1500, 2, 80))
    assert not splash_can(jnp.float64, (1, 2048, 2, 64))
    assert not splash_can(jnp.float32, (1, 2048, 2, 20))


def test_a_mesh_calls_a_fused_kernel_by_rows_and_heads(monkeypatch):
    """The splash kernel, interpreted, under a mesh: features and gradient are the plain ones'."""
    monkeypatch.setattr(fused, "SPLASH_SLOTS", 1)
    monkeypatch.setattr(module, "splash", functools.partial(splash, interpret=True))
    config = dataclasses.replace(
        SHAPES["tiny"], num_layers=1, width=32, head_dim=8, num_kv_heads=2, mlp_width=32
    )
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    plain = shard_model(LanguageModel(config, remat="none"), mesh)
    params = jax.jit(plain.init)(jax.random.key(0))["backbone"]
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, config.vocab_size)
    mask = jnp.ones((2, 24), bool).at[0, :9].set(False)

    def both(model):
        where = mask[:, :, None]
        loss = lambda b: jnp.sum(jnp.tanh(model.features(b, tokens, mask)), where=where)
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradient), (same, other) = both(plain), both(plain.on("tpu"))
    np.testing.assert_allclose(same, value, rtol=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max() + 1e-6)
    jax.tree.map(close, other, gradient)


def test_a_model_is_told_its_attention_once():
    model = LanguageModel(SHAPES["tiny"], jnp.bfloat16, "full")
    assert model.attention == model.on("cpu").attention == "plain"
    assert model.on("gpu").attention == "cudnn" and model.on("tpu").attention == "splash"
    assert model.on("gpu").unfused == model
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    sharded = shard_model(model.on("gpu"), mesh)  # of the mesh's devices, whatever it was before
    assert sharded == shard_model(model, mesh) and sharded.attention == "plain"
    assert sharded.on("gpu").unfused == sharded
