"""The two functions' own promises: padding, decoding, tied embeddings, precision, attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny_checkpoints

from jaxdyn.models import LanguageModel, config_from_hf, gpt_neox, load_pretrained, positions_of
from jaxdyn.models.attention import cached_attention, plain_attention
from jaxdyn.types import JaxdynError, KVCache

FAMILIES = ["gpt_neox_parallel", "llama_llama3_scaling", "gpt2_tied"]
LATER = ["qwen3_tied_window", "olmo2", "olmo3_yarn", "smollm3_tied_window", "gemma3_tied"]
TIED = ["gpt_neox_tied", "llama_tied_linear_scaling"]


def tiny(name, tmp_path, **options):
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.CONFIGS[name])
    return load_pretrained(tmp_path, **options)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens, mask):
    view = model.view(params)
    return model.logits(view["classifier"], model.features(view["backbone"], tokens, mask))


def test_positions_count_tokens_and_not_slots():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(positions_of(mask), expected)


@pytest.mark.parametrize("name", FAMILIES + LATER)
def test_padding_on_either_side_changes_nothing(name, tmp_path):
    """In float64, so that only the place of the zeros in a sum differs: 1e-12 on logits near 1."""
    with jax.enable_x64(True):
        model, params = tiny(name, tmp_path, dtype=jnp.float64)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        tokens, full = tiny_checkpoints.batch()[0][:, :6], np.ones((4, 6), bool)
        junk, blank = np.full((4, 3), 7, np.int32), np.zeros((4, 3), bool)
        beside = lambda *parts: jnp.asarray(np.concatenate(parts, axis=1))
        whole = full_logits(model, params, jnp.asarray(tokens), jnp.asarray(full))
        left = full_logits(model, params, beside(junk, tokens), beside(blank, full))
        right = full_logits(model, params, beside(tokens, junk), beside(full, blank))
        np.testing.assert_allclose(left[:, 3:], whole, atol=1e-12)
        np.testing.assert_allclose(right[:, :6], whole, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "apart"),
    [*((name, False) for name in FAMILIES + LATER), (FAMILIES[0], True), ("gemma3_tied", True)],
)
def test_prefill_then_decode_equals_the_full_pass(name, apart, tmp_path):
    """A window, where there is one, is of three or four: it leaves the prompt behind on the way."""
    model, params = tiny(name, tmp_path)
    if apart:
        model, params = model.unstack(params)
    backbone = params["backbone"]
    tokens = tiny_checkpoints.batch()[0] % model.config.vocab_size
    mask = np.ones(tokens.shape, bool)
    mask[1, :3] = mask[2, :4] = False
    positions = np.asarray(positions_of(jnp.asarray(mask)))
    prompt, slots = 5, tokens.shape[1]
    full, prefill, decode = map(jax.jit, (model.features, model.prefill, model.decode))
    expected = np.asarray(full(backbone, tokens, mask))
    first, prompts = prefill(backbone, tokens[:, :prompt], mask[:, :prompt])
    layers, rows, heads, _, width = prompts.keys.shape
    empty = jnp.zeros((layers, rows, heads, slots - prompt + 2, width))
    cache = KVCache(empty, empty)
    features = [np.asarray(first)]
    for slot in range(prompt, slots):
        seen = np.pad(mask[:, : slot + 1], ((0, 0), (0, slots + 1 - slot)))
        place = np.int32(slot - prompt)
        phi, cache = decode(
            backbone, tokens[:, slot], positions[:, slot], prompts, cache, seen, place
        )
        features.append(np.asarray(phi)[:, None])
    assert decode._cache_size() == 1
    difference = np.abs(np.concatenate(features, axis=1) - expected)[mask].max()
    assert difference < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", TIED)
def test_untying_keeps_the_logits_and_owns_its_matrix(name, tmp_path):
    model, params = tiny(name, tmp_path)
    tokens, mask = map(jnp.asarray, tiny_checkpoints.batch())
    untied, copied = model.untie(params)
    before = full_logits(model, params, tokens, mask)
    np.testing.assert_array_equal(full_logits(untied, copied, tokens, mask), before)
    copied["classifier"]["weight"] = copied["classifier"]["weight"] + 1
    np.testing.assert_array_equal(full_logits(model, params, tokens, mask), before)


@pytest.mark.parametrize("name", ["gemma3_text-tied", "gpt2-tied"])
def test_layers_apart_are_the_same_function_of_the_same_parameters(name, x64):
    model, params = oracles.tiny_model(name)
    apart, unstacked = model.unstack(params)
    assert model.config.num_layers > 1 and "layers" not in unstacked["backbone"]
    tokens, mask = map(jnp.asarray, tiny_checkpoints.batch())
    tokens %= model.config.vocab_size

    def squares(model, params):
        return jnp.sum(full_logits(model, params, tokens, mask) ** 2)

    take = jax.jit(jax.value_and_grad(squares, argnums=1), static_argnums=0)
    (value, by_layer), (want, gradient) = take(apart, unstacked), take(model, params)
    assert 0 < float(want) == pytest.approx(float(value), rel=1e-13)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=False)
    jax.tree.map(close, by_layer, model.unstack(gradient)[1])


@pytest.mark.parametrize("name", TIED)
def test_fold_of_a_views_gradient_is_the_tied_functions_gradient(name, tmp_path):
    with jax.enable_x64(True):
        model, params = tiny(name, tmp_path, dtype=jnp.float64)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        tokens, mask = map(jnp.asarray, tiny_checkpoints.batch())
        weight = jnp.where(mask, 1.0, 0.0)[..., None]

        def of_view(view):
            features = model.features(view["backbone"], tokens, mask)
            return jnp.sum(weight * jnp.tanh(model.logits(view["classifier"], features)))

        of_params = lambda params: of_view(model.view(params))
        both = jax.jit(lambda p: (jax.grad(of_params)(p), jax.grad(of_view)(model.view(p))))
        direct, in_view = both(params)
        folded = model.fold(in_view)
        assert jax.tree.structure(folded) == jax.tree.structure(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(direct))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), folded, direct)
        # Both paths count: the classifier's part alone is not the answer.
        shared = direct["backbone"]["embed"]["embedding"]
        assert np.abs(in_view["classifier"]["weight"] - shared).max() > 1e-3


def test_gradients_are_finite_where_a_row_sees_no_token(tmp_path):
    """A left-padded slot has nothing to attend to; that must not poison the whole gradient."""
    model, params = tiny("llama_llama3_scaling", tmp_path)
    tokens, mask = map(jnp.asarray, tiny_checkpoints.batch())
    loss = lambda p: full_logits(model, p, tokens, mask)[:, -5].sum()
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_a_token_or_position_beyond_the_tables_is_not_a_number(tmp_path):
    """It cannot raise inside a compiled program, so at least it cannot pass for a result."""
    model, params = tiny("gpt2_tied", tmp_path)
    features = jax.jit(model.features)
    places = model.config.max_positions
    tokens = np.zeros((2, places), np.int32)
    tokens[0, 3] = model.config.vocab_size
    got = np.asarray(features(params["backbone"], tokens, np.ones_like(tokens, bool)))
    assert np.isnan(got[0]).any()
    assert np.isfinite(got[1]).all()
    tokens = np.zeros((1, places + 1), np.int32)
    got = np.asarray(features(params["backbone"], tokens, np.ones_like(tokens, bool)))
    assert np.isnan(got[0, places]).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_computes_in_bfloat16_within_its_rounding(name, tmp_path):
    """Rounding to 8 bits moves a value by at most u = 2^-8 of it.

    The longest path from embedding to logit passes, a layer, through two norms, two projections in
    and two out, rotation, scores, weights, the mix, the activation, its gate and two residual sums:
    14 roundings of values and 6 of weights; around the layers an embedding, a final norm and the
    classifier's weight. Taken to add up at worst, in root mean square: (20 L + 3) u of the logits.
    """
    model, params = tiny(name, tmp_path)
    narrow = dataclasses.replace(model, dtype=jnp.bfloat16)
    tokens, mask = map(jnp.asarray, tiny_checkpoints.batch())
    logits = full_logits(narrow, params, tokens, mask)
    features = jax.eval_shape(narrow.features, params["backbone"], tokens, mask)
    assert features.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = np.asarray(full_logits(model, params, tokens, mask))[np.asarray(mask)]
    error = np.asarray(logits)[np.asarray(mask)] - exact
    relative = np.sqrt(np.mean(error**2) / np.mean(exact**2))
    u = 2.0**-8
    assert u / 4 < relative < (20 * model.config.num_layers + 3) * u


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_plain_attention_agrees_with_the_platforms(kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 6, 4, 8))
    key, value = (jax.random.normal(k, (2, 6, kv_heads, 8)) for k in keys[1:])
    mask = jnp.tril(jnp.ones((6, 6), bool))[None, None] & jnp.array(
        [[True] * 6, [False] * 2 + [True] * 4]
    ).reshape(2, 1, 1, 6)
    fused = jax.jit(jax.nn.dot_product_attention)(query, key, value, mask=mask)
    plain = jax.jit(plain_attention)(query, key, value, mask)
    # Sums of at most 8 products of numbers below 5, each rounded to 6e-8 of itself.
    np.testing.assert_allclose(plain, fused, atol=8 * 25 * 6e-8)


def test_wide_attention_keeps_float64(x64):
    """Softmax in float64: against numpy's own, to 1e-14 where float32 would leave 1e-8."""
    generator = np.random.default_rng(0)
    query, key, value = (generator.normal(size=(1, 5, 2, 4)) for _ in range(3))
    mask = np.tril(np.ones((5, 5), bool))[None, None]
    scores = np.einsum("bthw,bkhw->bhtk", query, key) / 2
    weights = np.where(mask, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhtk,bkhw->bthw", weights, value)
    got = plain_attention(*map(jnp.asarray, (query, key, value, mask)))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-14)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # Values are below 4. Float32 rounds scores below 10; bfloat16 the weights, and the two parts
    # and their sum once each.
    [("float64", 1e-14), ("float32", 4 * 10 * 2.0**-24), ("bfloat16", 4 * 4 * 2.0**-9)],
)
def test_cached_attention_is_plain_attention_on_prompt_and_completion(kv_heads, dtype, tolerance):
    """Three generations a prompt, two prompts, padding on the left and slots not yet written."""
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)
        query = draw(6, 1, 4, 8)
        shared = [draw(2, kv_heads, 5, 8) for _ in range(2)]
        own = [draw(6, kv_heads, 7, 8) for _ in range(2)]
        prompt_mask = np.arange(5)[None] >= np.array([2, 0])[:, None]
        mask = np.concatenate([np.repeat(prompt_mask, 3, 0), np.arange(7)[None] < [[4]] * 6], 1)
        mask = jnp.asarray(mask)[:, None, None]
        key, value = (
            jnp.concatenate([jnp.repeat(x, 3, axis=0), y], axis=2).swapaxes(1, 2)
            for x, y in zip(shared, own, strict=True)
        )
        wide = [x.astype(jnp.float64) for x in (query, key, value)]
        expected = plain_attention(*wide, mask)
        got = jax.jit(cached_attention)(query, *shared, *own, mask)
        assert got.dtype == query.dtype
        np.testing.assert_allclose(got.astype(jnp.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["gpt_neox_parallel", "gpt2_tied"])
def test_init_has_the_checkpoints_shapes_and_small_residual_writes(name):
    model = LanguageModel(config_from_hf(tiny_checkpoints.CONFIGS[name]))
    params = jax.jit(model.init)(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    wanted = sum(
        np.prod(s) for s in tiny_checkpoints.shapes(tiny_checkpoints.CONFIGS[name]).values()
    )
    assert count == wanted
    layers = params["backbone"]["layers"]
    std = float(jnp.std(layers["mlp"]["down"]["kernel"]))
    # 2 layers x 48 x 24 or more draws: the sample's deviation is within 5/sqrt(2n) of the truth.
    n = layers["mlp"]["down"]["kernel"].size
    assert abs(std / (0.02 / 2) - 1) < 5 / (2 * n) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width (30) must be a multiple of num_heads (4)"),
        ({"width": 32, "num_heads": 4, "rotary_fraction": 0.4}, "must be even, got 8 * 0.4 = 3"),
        ({"width": 32, "num_heads": 4, "rotary_fraction": 1.5}, "from 0 to 1, got 1.5"),
        ({"width": 32, "num_heads": 0}, "num_heads (0)"),
        ({"width": 32, "num_heads": 4, "num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"width": 32, "num_heads": 4, "window": 0}, "window must be at least 1, got 0"),
        ({"width": 32, "num_heads": 4, "window": 3}, "window must be given if any"),
        ({"width": 32, "num_heads": 4, "windowed": (True,)}, "window must be given if any"),
        (
            {"width": 32, "num_heads": 4, "rotated": (True, False)},
            "each of 1 layers or none, got 2",
        ),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(JaxdynError) as error:
        gpt_neox(vocab_size=7, **{"num_layers": 1, **options})
    assert message in str(error.value)
