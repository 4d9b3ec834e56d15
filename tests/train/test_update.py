"""The two jitted updates: what they compute, what they cost, and that they compile once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracles
import pytest

from jaxdyn.models import LanguageModel, gpt_neox
from jaxdyn.optim import OptimConfig, make_optimizer, trainable
from jaxdyn.rl import LossConfig
from jaxdyn.train import TrainState, UpdateBatch, fresh_state, update
from jaxdyn.train.sharing import batch_features

B, S, C = 4, 3, 4
ADAM = OptimConfig(eps=1e-3, weight_decay=0.1)
SGD = OptimConfig(optimizer="sgd", max_grad_norm=0.0)
GRPO = LossConfig(beta=0.1)
RATE, TEMPERATURE = 0.01, 0.7


def tiny_batch(vocab=oracles.VOCAB, with_old=True):
    """B sequences, left-padded prompts and completions of several lengths."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape) - 2)
    prompt_mask = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]], bool)
    completion_mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    tokens = rng.integers(0, vocab, (B, S + C)).astype(np.int32)
    return UpdateBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(np.concatenate([prompt_mask, completion_mask], axis=1)),
        completion_ids=jnp.asarray(tokens[:, S:]),
        completion_mask=jnp.asarray(completion_mask),
        advantages=jnp.asarray([1.0, -0.5, 0.7, -1.2]),
        old_per_token_logps=draw(B, C) if with_old else None,
        ref_per_token_logps=draw(B, C) if with_old else None,
    )


def fresh(model, params, optim, stage="joint"):
    """The state of what moves, of copies, since the update takes its buffers."""
    state = fresh_state(model, params, optim, stage)
    return state.replace(params=trainable(optim, stage, state.params)[0])


def joint(model, params, batch, loss=GRPO, optim=ADAM, rate=RATE, microbatches=1):
    static = {"model": model, "loss": loss, "optim": optim, "microbatches": microbatches}
    scalars = jnp.float64(rate), jnp.float64(TEMPERATURE)
    return update(fresh(model, params, optim), {}, batch, None, *scalars, **static)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_accumulation_changes_nothing_but_memory(x64):
    model, params = oracles.tiny_model("gpt_neox-untied")
    batch = tiny_batch()
    whole, metrics = joint(model, params, batch)
    for microbatches in (2, 4):
        state, split = joint(model, params, batch, microbatches=microbatches)
        assert_trees_close(state.params, whole.params, rtol=0, atol=1e-12)
        assert_trees_close(split, metrics, rtol=0, atol=1e-12)
    assert {"loss", "kl", "clip_ratio/low_mean", "entropy", "grad_norm"} <= metrics.keys()


def test_when_only_the_classifier_moves_both_updates_move_it_alike(x64):
    model, params = oracles.tiny_model("gpt_neox-untied")
    batch = tiny_batch()
    state, metrics = joint(model, params, batch, optim=SGD)
    features = batch_features(model, params["backbone"], batch)
    for microbatches in (1, 2):
        alone, mine = update(
            fresh(model, params, SGD, "classifier"),
            {},
            batch,
            features,
            jnp.float64(RATE),
            jnp.float64(TEMPERATURE),
            model=model,
            loss=GRPO,
            optim=SGD,
            microbatches=microbatches,
        )
        classifier = alone.params["classifier"]
        assert_trees_close(classifier, state.params["classifier"], rtol=0, atol=1e-13)
        for name in mine.keys() - {"grad_norm", "update_norm"}:
            np.testing.assert_allclose(mine[name], metrics[name], rtol=0, atol=1e-13)
    moved = jnp.abs(classifier["weight"] - params["classifier"]["weight"]).max()
    assert float(moved) > 1e-4
    norm = np.linalg.norm(classifier["weight"] - params["classifier"]["weight"])
    np.testing.assert_allclose(mine["update_norm"], norm, rtol=1e-10)
    np.testing.assert_allclose(mine["grad_norm"], norm / RATE, rtol=1e-10)


@functools.partial(jax.jit, static_argnums=0)
def plain_gradients(model, params, batch):
    """∇θ of −(1/B) Σ_b A_b / |y_b| Σ_t log π(y_bt) of the stored (tied) parameters; and its part
    through the head alone."""

    def value(params, head=None):
        view = model.view(params)
        weight = view["classifier"]["weight"] if head is None else head
        phi = model.features(view["backbone"], batch.tokens, batch.mask)[:, S - 1 : -1]
        log_probs = jax.nn.log_softmax(phi @ weight.T / TEMPERATURE)
        chosen = jnp.take_along_axis(log_probs, batch.completion_ids[..., None], 2)[..., 0]
        per_row = jnp.sum(chosen * batch.completion_mask, 1) / batch.completion_mask.sum(1)
        return -jnp.mean(batch.advantages * per_row)

    shared = params["backbone"]["embed"]["embedding"]
    return jax.grad(value)(params), jax.grad(lambda head: value(params, head))(shared)


def test_a_tied_models_update_is_the_gradient_of_the_tied_loss(x64):
    model, params = oracles.tiny_model("llama-tied")
    batch = tiny_batch(with_old=False)
    state, _ = joint(model, params, batch, LossConfig(), SGD)
    gradient, through_head = plain_gradients(model, params, batch)
    expected = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
    assert_trees_close(state.params, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(state.head_share, -RATE * through_head, rtol=0, atol=1e-14)
    assert float(jnp.abs(through_head).max()) > 1e-2


def test_nothing_compiles_twice_and_the_old_state_is_given_up():
    model, params = oracles.tiny_model("gpt_neox-untied", jnp.float32)
    batch = tiny_batch()
    state, alone = fresh(model, params, ADAM), fresh(model, params, ADAM, "classifier")
    features = batch_features(model, params["backbone"], batch)
    static = {"model": model, "loss": GRPO, "optim": ADAM}
    sizes = []
    for step in range(3):
        rate, temperature = jnp.float32(0.1**step), jnp.float32(1 + step)
        batch = batch.replace(advantages=batch.advantages + step)
        old, old_alone = state, alone
        state, _ = update(state, {}, batch, None, rate, temperature, **static)
        alone, _ = update(alone, {}, batch, features, rate, temperature, **static)
        sizes.append(update._cache_size())
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old_alone.params)))
    assert sizes[0] == sizes[1] == sizes[2]


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


def test_the_classifier_stage_has_no_pass_through_the_body(monkeypatch):
    """One layer, so that the cost analysis, which counts a scanned body once, counts all of it.

    On features as data an update needs f = φWᵀ and ∂/∂W = gᵀφ, 2·B·C·D·V flops each, and some
    tens of flops a logit for the softmax and the loss. Optimizing takes some tens a parameter.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shapes, not arrays
    width, vocab = 64, 8
    model = LanguageModel(gpt_neox(vocab, width, num_layers=1, num_heads=2, max_positions=16))
    batch = tiny_batch(vocab)
    params = jax.eval_shape(model.init, jax.random.key(0))
    init = make_optimizer(ADAM).init
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    features = jax.ShapeDtypeStruct((B, C, width), jnp.float32)
    static = {"model": model, "loss": GRPO, "optim": ADAM}
    state = lambda moving: jax.eval_shape(lambda p: TrainState(p, init(p)), moving)
    alone = state({"classifier": params["classifier"]})
    lowered = update.lower(alone, {}, batch, features, scalar, scalar, **static)
    classifier_flops = flops(lowered)
    joint_flops = flops(update.lower(state(params), {}, batch, None, scalar, scalar, **static))
    forward_flops = flops(batch_features.lower(model, params["backbone"], batch))

    # All that the program is given: W, its optimizer's moments, features, batch, two scalars.
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    given = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(lowered.args_info))
    assert given == size((alone, features, batch)) + 2

    matrices = 4 * B * C * width * vocab
    assert matrices <= classifier_flops <= matrices + 60 * (B * C * vocab + vocab * width)
    assert forward_flops >= 2 * B * (S + C) * 12 * width**2
    # Forward and backward through the body, against neither.
    assert joint_flops - classifier_flops >= 2.5 * forward_flops
    assert classifier_flops < 0.1 * forward_flops


@pytest.mark.parametrize("microbatches", [1, 2])
def test_without_old_log_probs_the_ratio_is_one(microbatches, x64):
    """Then GRPO's loss is −(1/B) Σ_b A_b, whatever the model says."""
    model, params = oracles.tiny_model("gpt_neox-untied")
    batch = tiny_batch(with_old=False)
    loss = dataclasses.replace(GRPO, beta=0.0)
    _, metrics = joint(model, params, batch, loss, microbatches=microbatches)
    np.testing.assert_allclose(metrics["loss"], -np.mean([1.0, -0.5, 0.7, -1.2]), atol=1e-14)
