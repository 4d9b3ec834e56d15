"""Generation: against teacher-forced passes of real models, and on a scripted Markov chain."""

import dataclasses
import functools
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxdyn.models import LanguageModel
from jaxdyn.rl import token_statistics
from jaxdyn.rollout import SamplingConfig, generate, step_key, trim
from jaxdyn.rollout.generate import cache_sizes
from jaxdyn.types import JaxdynError, KVCache, Model, PromptBatch, Rollout

VOCAB = 31
# The oracles' tiny models, wider, so that sampled log-probs differ.
NEOX, LLAMA, GPT2 = (
    dataclasses.replace(
        oracles.CONFIGS[name],
        vocab_size=VOCAB,
        width=16,
        num_heads=4,
        num_kv_heads=kv_heads,
        mlp_width=64,
    )
    for name, kv_heads in (("gpt_neox-untied", 4), ("llama-untied", 2), ("gpt2-tied", 4))
)


def prompts():
    """Three left-padded prompts of 5, 2 and 1 tokens in 5 slots; the padding holds garbage."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 5))
    mask = np.arange(5)[None] >= 5 - np.array([5, 2, 1])[:, None]
    return PromptBatch(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


@functools.cache
def built(config):
    """A model whose every parameter matters: random, far from the near-uniform initial policy."""
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    return model, model.view(params)


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(model, view, rollout, temperature):
    """Logits at the completions' slots by one full pass, and the log-probs of their tokens."""
    slots = rollout.completion_ids.shape[1]
    features = model.features(view["backbone"], rollout.tokens, rollout.mask)
    logits = model.logits(view["classifier"], features[:, -slots - 1 : -1])
    return logits, token_statistics(logits, rollout.completion_ids, temperature).logps


NEVER = -1  # a stop id that no token has


def sample(config, key, *, num_generations=4, stop_ids=(NEVER, NEVER), **settings):
    """Completions of `prompts()`; the same shapes throughout, so one compilation a model."""
    model, view = built(config)
    return generate(
        model,
        view,
        prompts(),
        key,
        num_generations=num_generations,
        max_completion_length=9,
        stop_ids=stop_ids,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [NEOX, LLAMA, GPT2], ids=["gpt_neox", "llama gqa", "gpt2 tied"])
def test_log_probs_are_those_of_a_teacher_forced_pass(config):
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "stop_ids": (3, 4)}
    rollout = sample(config, jax.random.key(2), **settings)
    mask = np.asarray(rollout.completion_mask)
    assert mask.shape == (12, 9) and 12 < mask.sum() < mask.size, "some rows must stop early"
    want = teacher_forced(*built(config), rollout, 0.8)[1]
    np.testing.assert_allclose(
        np.where(mask, rollout.per_token_logps, 0), np.where(mask, want, 0), rtol=0, atol=1e-4
    )
    assert np.std(np.asarray(want)[mask]) > 0.3, "a policy so flat would hide mistakes"
    assert (np.asarray(rollout.per_token_logps)[~mask] == 0).all()
    for name in ("prompt_ids", "prompt_mask"):
        repeated = np.repeat(getattr(prompts(), name), 4, axis=0)
        np.testing.assert_array_equal(getattr(rollout, name), repeated)


# A float32 pass rounds each of a few dozen sums of at most 16 products of numbers near 1 by up to
# 16 * 2^-24; the two passes' roundings differ. Float64 has 1e-10 to spare.
@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        ("gpt_neox-untied", "float64", 1e-10),
        ("gemma3_text-tied", "float64", 1e-10),
        pytest.param("gpt2-tied", "float64", 1e-10, marks=pytest.mark.slow),
        ("llama-untied", "float32", 50 * 16 * 2.0**-24),
    ],
)
def test_harvested_features_are_those_of_a_teacher_forced_pass(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model, params = oracles.tiny_model(name, jnp.dtype(dtype))
        batch = prompts()
        batch = batch.replace(prompt_ids=batch.prompt_ids % oracles.VOCAB)
        rollout = generate(
            model,
            model.view(params),
            batch,
            jax.random.key(2),
            num_generations=4,
            max_completion_length=6,
            temperature=3.0,
            stop_ids=(3, 4),
            harvest=True,
        )
        mask = np.asarray(rollout.completion_mask)
        assert 24 < mask.sum() < mask.size, "some rows must stop early"
        view = model.view(params)
        full = jax.jit(model.features)(view["backbone"], rollout.tokens, rollout.mask)
        want = np.asarray(full)[:, -mask.shape[1] - 1 : -1]
        assert rollout.features.dtype == want.dtype == dtype
        np.testing.assert_allclose(
            rollout.features, np.where(mask[..., None], want, 0), rtol=0, atol=tolerance
        )
        logits = model.logits(view["classifier"], jnp.asarray(want)) / np.float32(3)
        logps = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), np.asarray(rollout.completion_ids)[..., None], 2
        )[..., 0]
        assert rollout.per_token_logps.dtype == dtype
        # A logit sums D products with weights near 1; the log-partition moves no more than a logit.
        np.testing.assert_allclose(
            rollout.per_token_logps,
            np.where(mask, logps, 0),
            rtol=0,
            atol=2 * want.shape[-1] * tolerance,
        )


@pytest.mark.slow
def test_harvesting_changes_no_draw():
    plain, harvested = (
        sample(LLAMA, jax.random.key(6), harvest=harvest) for harvest in (False, True)
    )
    assert plain.features is None and harvested.features.shape == (12, 9, 16)
    np.testing.assert_array_equal(plain.completion_ids, harvested.completion_ids)
    np.testing.assert_allclose(plain.per_token_logps, harvested.per_token_logps, atol=1e-5)


@pytest.mark.parametrize(
    "length, sizes",
    [(1, [1]), (64, [64]), (65, [64, 65]), (200, [64, 128, 192, 200]), (512, [128, 256, 384, 512])],
)
def test_a_cache_grows_in_up_to_four_steps(length, sizes):
    assert cache_sizes(length) == sizes


@pytest.mark.slow
def test_how_the_cache_grows_changes_no_draw(monkeypatch):
    """Nine tokens from caches of 3, 6 and 9 slots, as from one of 9."""
    whole = sample(LLAMA, jax.random.key(6), harvest=True)
    module = sys.modules[generate.__module__]  # whose name is also the function's
    monkeypatch.setattr(module, "SMALLEST_CACHE", 3)
    made = []
    monkeypatch.setattr(module, "cache_sizes", lambda n: made.append(cache_sizes(n)) or made[-1])
    module._generate.clear_cache()
    grown = sample(LLAMA, jax.random.key(6), harvest=True)
    module._generate.clear_cache()  # so that nobody meets it again
    assert made == [[3, 6, 9]]
    np.testing.assert_array_equal(grown.completion_ids, whole.completion_ids)
    np.testing.assert_array_equal(grown.completion_mask, whole.completion_mask)
    # Float32 features of unit size, whose sums over slots are taken in another order.
    np.testing.assert_allclose(grown.features, whole.features, rtol=0, atol=1e-5)


def rollout_of(lengths, slots):
    mask = jnp.arange(slots)[None] < jnp.asarray(lengths)[:, None]
    rows = len(lengths)
    count = lambda *shape: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    prompt = jnp.ones((rows, 3), jnp.int32)
    ids = count(rows, slots).astype(jnp.int32)
    return Rollout(prompt, prompt > 0, ids, mask, count(rows, slots), count(rows, slots, 2))


@pytest.mark.parametrize(
    "lengths, slots, kept",
    [
        ([1, 3], 64, 8),
        ([8, 2], 64, 8),
        ([9, 2], 64, 16),
        ([3, 33], 64, 64),
        ([64, 1], 64, 64),
        ([17, 1], 20, 20),
        ([2, 2], 5, 5),
    ],
)
def test_trimming_keeps_the_bucket_of_the_longest_completion(lengths, slots, kept):
    rollout = rollout_of(lengths, slots)
    cut = trim(rollout)
    for name in ("completion_ids", "completion_mask", "per_token_logps", "features"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(rollout, name)[:, :kept])
    for name in ("prompt_ids", "prompt_mask"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(rollout, name))
    assert cut.completion_mask.sum() == sum(lengths)
    assert trim(rollout.replace(features=None)).features is None


def test_greedy_is_the_argmax_of_a_teacher_forced_pass():
    rollout = sample(NEOX, jax.random.key(0), temperature=0.0)
    logits, logps = teacher_forced(*built(NEOX), rollout, 1.0)
    np.testing.assert_array_equal(rollout.completion_ids, logits.argmax(axis=-1))
    np.testing.assert_allclose(rollout.per_token_logps, logps, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(rollout.completion_ids[::4], rollout.completion_ids[3::4])
    assert rollout.completion_mask.all()


def test_what_the_padding_holds_changes_nothing():
    batch = prompts()
    other = batch.replace(prompt_ids=jnp.where(batch.prompt_mask, batch.prompt_ids, 0))
    assert (other.prompt_ids != batch.prompt_ids).any()
    one, two = (
        generate(
            *built(NEOX),
            prompt,
            jax.random.key(5),
            num_generations=4,
            max_completion_length=9,
            stop_ids=(NEVER, NEVER),
        )
        for prompt in (batch, other)
    )
    np.testing.assert_array_equal(one.completion_ids, two.completion_ids)
    np.testing.assert_array_equal(one.per_token_logps, two.per_token_logps)


def test_steps_and_generations_never_draw_alike():
    keys = [step_key(0, "rollout", step) for step in range(3)]
    draws = [sample(NEOX, key, temperature=3.0).completion_ids for key in keys]
    completions = np.concatenate(draws)
    assert len({tuple(row) for row in completions}) == len(completions) == 36


def test_the_same_key_gives_the_same_rollout():
    one, two = (sample(NEOX, step_key(0, "rollout", 0)) for _ in range(2))
    for name in ("completion_ids", "completion_mask", "per_token_logps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.slow
def test_only_shapes_compile():
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event)
    compilations = lambda: [event for event in compiled if "compile" in event]
    prompts(), built(NEOX), sample(NEOX, step_key(0, "rollout", 0))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sample(NEOX, step_key(0, "rollout", 1))
        sample(NEOX, step_key(1, "evaluation", -1), temperature=0.0)
        sample(NEOX, step_key(0, "rollout", 2), temperature=0.3, top_k=5, top_p=0.5, min_p=0.1)
        sample(NEOX, step_key(0, "rollout", 3), stop_ids=(7, 8), pad_id=2)
        assert not compilations()
        sample(NEOX, step_key(0, "rollout", 4), num_generations=3)
        assert compilations(), "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def rounded_inside_loops(jaxpr, inside=False):
    """Shapes of what the loops of a program turn from float32 to bfloat16."""
    found = set()
    for one in jaxpr.eqns:
        arrays = [x.aval for x in (*one.invars[:1], *one.outvars[:1])]
        rounds = [getattr(x, "dtype", None) for x in arrays] == [jnp.float32, jnp.bfloat16]
        if inside and rounds and one.primitive.name == "convert_element_type":
            found.add(arrays[0].shape)
        for part in jax.tree.leaves(list(one.params.values()), is_leaf=is_program):
            if is_program(part):
                inner = getattr(part, "jaxpr", part)
                found |= rounded_inside_loops(inner, inside or one.primitive.name == "while")
    return found


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("name", ["gpt2-tied", "gpt_neox-untied"])
def test_weights_are_rounded_before_the_loop_and_not_at_every_token(name):
    """The same bits; XLA's compiler for GPUs leaves in the loop what it finds there."""
    model, params = oracles.adapted_model(name, jnp.float32)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    view = model.view(params)
    rounded = model.rounded(view)
    shapes = {x.shape for x in jax.tree.leaves(rounded) if x.dtype == jnp.bfloat16}
    assert (oracles.VOCAB, model.config.width) in shapes  # W, tied or not, beside the layers'
    weights = {shape for whole in shapes for shape in (whole, whole[1:])}
    prompts = PromptBatch(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool))
    draw = functools.partial(generate, num_generations=1, max_completion_length=3)
    program = jax.make_jaxpr(lambda p: draw(model, p, prompts, jax.random.key(0)))(params)
    met = rounded_inside_loops(program.jaxpr)
    assert met and not met & weights

    features = lambda p: model.features(p["backbone"], prompts.prompt_ids, prompts.prompt_mask)
    logits = lambda p: model.logits(p["classifier"], features(p))
    np.testing.assert_array_equal(jax.jit(logits)(rounded), jax.jit(logits)(view))


# -- a scripted model: a Markov chain, decoded greedily, that counts its decode steps -------------


@dataclasses.dataclass(frozen=True)
class _Context:
    max_positions: int = 64


@dataclasses.dataclass(frozen=True)
class Chain(Model):
    """Token v is followed by `successor[v]`; features are one-hot, W holds the successors."""

    vocab: int
    config: _Context = _Context()
    steps: ClassVar[list[int]] = []
    dtype: ClassVar = jnp.float32
    shards: ClassVar[int] = 1
    row_shards: ClassVar[int] = 1

    def view(self, params):
        return params

    def rounded(self, view):
        return view

    def prefill(self, backbone, tokens, mask):
        cache = jnp.zeros((1, tokens.shape[0], 1, tokens.shape[1], 1))
        return jax.nn.one_hot(tokens, self.vocab), KVCache(cache, cache)

    def decode(self, backbone, token, position, prompt, cache, mask, slot):
        jax.debug.callback(lambda slot: self.steps.append(int(slot)), slot)
        return jax.nn.one_hot(token, self.vocab), cache

    def logits(self, classifier, features):
        return features @ classifier["weight"]


def chained(successor, starts, **kwargs):
    """Greedy completions of one-token prompts, and how many decode steps they took."""
    model = Chain(len(successor))
    weight = 10.0 * jax.nn.one_hot(jnp.asarray(successor), len(successor))
    ids = jnp.asarray(starts, jnp.int32)[:, None]
    model.steps.clear()
    rollout = generate(
        model,
        {"backbone": {}, "classifier": {"weight": weight}},
        PromptBatch(ids, jnp.ones_like(ids, bool)),
        jax.random.key(0),
        num_generations=1,
        temperature=0.0,
        **kwargs,
    )
    jax.effects_barrier()
    return np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask), model.steps


COUNT_UP = [1, 2, 3, 4, 5, 6, 7, 0]


def test_the_stop_token_ends_a_completion_and_belongs_to_it():
    ids, mask, _ = chained(COUNT_UP, [3, 2, 5], max_completion_length=5, stop_ids=(4, 6), pad_id=7)
    np.testing.assert_array_equal(ids, [[4, 7, 7, 7, 7], [3, 4, 7, 7, 7], [6, 7, 7, 7, 7]])
    np.testing.assert_array_equal(mask.sum(axis=1), [1, 2, 1])
    np.testing.assert_array_equal(mask[:, 0], True)


def test_a_completion_that_never_stops_fills_its_mask():
    ids, mask, _ = chained(COUNT_UP, [0, 6], max_completion_length=4, stop_ids=(5,))
    np.testing.assert_array_equal(ids, [[1, 2, 3, 4], [7, 0, 1, 2]])
    assert mask.all()


def test_the_pad_id_may_be_a_stop_id():
    ids, mask, _ = chained(COUNT_UP, [1, 3], max_completion_length=4, stop_ids=(4,), pad_id=4)
    np.testing.assert_array_equal(ids, [[2, 3, 4, 4], [4, 4, 4, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 0, 0, 0]])


def test_the_pad_id_may_be_sampled_without_stopping():
    ids, mask, _ = chained(COUNT_UP, [6], max_completion_length=4, stop_ids=(5,), pad_id=0)
    np.testing.assert_array_equal(ids, [[7, 0, 1, 2]])
    assert mask.all()


@pytest.mark.parametrize("starts, steps", [([3, 3], 0), ([3, 1], 2), ([4, 3], 3)])
def test_decoding_ends_when_every_completion_has(starts, steps):
    """Slots written: token t is written to slot t, and the last never."""
    _, _, slots = chained(COUNT_UP, starts, max_completion_length=4, stop_ids=(4,))
    np.testing.assert_array_equal(sorted(slots), np.arange(steps))


def test_one_token_needs_no_decoding():
    ids, mask, slots = chained(COUNT_UP, [2], max_completion_length=1, stop_ids=())
    assert ids.tolist() == [[3]] and mask.all() and not slots


# -- refusals -----------------------------------------------------------------------------------


def test_prompts_beyond_the_context_are_refused():
    model, view = built(NEOX)
    with pytest.raises(JaxdynError, match=r"5 slots and completions of 28 exceed .* of 32"):
        generate(
            model, view, prompts(), jax.random.key(0), num_generations=2, max_completion_length=28
        )


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\], got 1.5"),
        ({"stop": ("a", "")}, r"stop must be non-empty texts, got \('a', ''\)"),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(JaxdynError, match=rf"^sampling\.{words}"):
        SamplingConfig(**fields)
