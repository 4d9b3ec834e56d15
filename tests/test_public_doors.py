"""Every public function of (model, params, …) takes parameters as stored, tied or not.

The oracle of a tied model is its untied twin, the same function with a copy of the shared matrix:
what comes through the classifier and what comes through the body are the same of both.
"""

import dataclasses
import importlib
import inspect
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_imports import PACKAGES

from jaxdyn import dynamics, kernels, models, rollout
from jaxdyn.optim import OptimConfig
from jaxdyn.train import fresh_state
from jaxdyn.types import PromptBatch, Rollout

SITES = oracles.tiny_sites()
KEY = jax.random.key(0)
PROMPTS = PromptBatch(SITES.tokens[1:, :4], SITES.mask[1:, :4])
COMPLETIONS = Rollout(
    SITES.tokens[:2, :4],
    SITES.mask[:2, :4],
    SITES.tokens[:2, 4:],
    jnp.ones((2, 2), bool),
    jnp.zeros((2, 2), jnp.float32),
)


def cotangents():
    return np.random.default_rng(5).standard_normal((5, oracles.VOCAB))


def paths(kernel):
    return {"representation": kernel.representation, "gradient": kernel.gradient}


def logits(model, params):
    return {"logits": oracles.site_logits(model, model.view(params), SITES)}


def moved(params):
    """An update; leaves of one shape, as a matrix and its copy, move alike."""
    draw = lambda x: 0.01 * np.cos(np.arange(x.size)).reshape(x.shape)
    return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), params)


def after(params):
    add = lambda x, d: jnp.asarray(np.asarray(x) + np.asarray(d))
    return jax.tree.map(add, params, moved(params))


def state(model, params):
    found = dynamics.site_state(model, params, SITES)
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}


def measured_state(model, params):
    start = dynamics.site_state(model, params, SITES)
    new = after(params)
    return dynamics.measure_state(model, new, SITES, start, start).scalars


def measured_update(model, params):
    found = dynamics.measure_update(model, params, after(params), SITES).arrays
    return {name: found[name] for name in ("representation", "gradient", "actual")}


def sampled(model, params):
    found = rollout.generate(
        model, params, PROMPTS, KEY, num_generations=2, max_completion_length=3
    )
    return {"ids": found.completion_ids, "log-probs": found.per_token_logps}


def saved_and_loaded(model, params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with tempfile.TemporaryDirectory() as directory:
        models.save_pretrained(directory, model, narrow)
        loaded = models.load_pretrained(directory)
    np.testing.assert_allclose(
        logits(*loaded)["logits"], logits(model, params)["logits"], rtol=0, atol=1e-4
    )
    return logits(*loaded)


def scores(model, params, head=None):
    """Of a language model, its last logits; a head of zeros is set to something."""
    if head is not None:
        params = {**params, "classifier": {"weight": head + params["classifier"]["weight"]}}
    return {"scores": models.sequence_scores(model, params, SITES.tokens, SITES.mask)}


def adapted(model, params):
    config = models.LoraConfig(rank=2, alpha=4.0)
    model, params = models.add_adapters(model, params, config, KEY, backbone=True, classifier=True)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 if "lora_b" in str(path) else x, params
    )


def of_sites(function, **options):
    return lambda model, params: paths(function(model, params, SITES, **options))


def influenced(model, params):
    """By stored parameters, of which a tied model's untied twin has one more."""
    given = {"weights": np.ones((2, 2, 2)), "temperature": 0.7}
    return dynamics.contributions(model, params, SITES, COMPLETIONS, **given)


def accounted(model, params):
    given = {"weights": np.ones((2, 2, 2)), "temperature": 0.7}
    ones = jax.tree.map(lambda x: jnp.asarray(np.ones_like(x)), params)
    change = {"decay": dynamics.Change(moved(params))}
    found = dynamics.influence(
        model, params, after(params), SITES, COMPLETIONS, metric=ones, others=change, **given
    )
    return paths(found.completions) | {"decay": found.others["decay"].total, "h": found.actual}


def stored(model, params):
    """In a file, in float32, to which rounding in float64 makes no difference."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/sketches"
        found = kernels.store_sketches(path, model, params, SITES, KEY, replicates=2, side=2)
        return {"body": found.rows[:, 1].astype(np.float64)}


DOORS = {
    "dynamics.contributions": lambda m, p: paths(influenced(m, p)),
    "dynamics.influence": accounted,
    "dynamics.own_tokens": lambda m, p: paths(
        dynamics.own_tokens(m, p, SITES, jnp.ones((5, 2)), 0.7)
    ),
    "dynamics.delta_logits": lambda m, p: paths(dynamics.delta_logits(m, p, moved(p), SITES)[1]),
    "dynamics.most_changed_tokens": lambda m, p: {
        "ids": dynamics.most_changed_tokens(m, p, after(p), SITES, 4)
    },
    "dynamics.measure_state": measured_state,
    "dynamics.measure_update": measured_update,
    "dynamics.propagate": lambda m, p: paths(dynamics.propagate(m, p, moved(p), SITES)),
    "dynamics.site_state": state,
    "kernels.apply_kernel": lambda m, p: paths(kernels.apply_kernel(m, p, SITES, cotangents())),
    "kernels.log_prob_kernel": of_sites(kernels.log_prob_kernel),
    "kernels.policy_kernel": lambda m, p: paths(
        kernels.policy_kernel(m, p, SITES, COMPLETIONS, weights=np.ones((2, 2, 2)))
    ),
    "kernels.sequence_kernel": lambda m, p: paths(kernels.sequence_kernel(m, p, COMPLETIONS)),
    # A tied matrix has one set of signs on its two paths, so the classifier's sketch differs.
    "kernels.sketch_gradients": lambda m, p: {
        "body": kernels.sketch_gradients(m, p, SITES, KEY, replicates=2, side=2).body
    },
    "kernels.sketch_sequences": lambda m, p: {
        "body": kernels.sketch_sequences(m, p, COMPLETIONS, KEY, replicates=2, side=2).body
    },
    "kernels.store_sketches": stored,
    "kernels.token_block": of_sites(kernels.token_block, token_ids=[1, 4]),
    "kernels.top_eigenpairs": lambda m, p: {
        "values": kernels.top_eigenpairs(
            m, p, SITES, 2, cotangents=cotangents(), component="gradient", tolerance=1e-10
        ).values
    },
    "kernels.trace_kernel": of_sites(kernels.trace_kernel),
    "kernels.update_kernel": lambda m, p: paths(
        kernels.update_kernel(m, p, SITES, cotangents_a=jnp.asarray(cotangents()))
    ),
    "models.add_adapters": lambda m, p: logits(*adapted(m, p)),
    "models.add_sequence_head": lambda m, p: scores(*models.add_sequence_head(m, p), head=1.0),
    "models.sequence_scores": scores,
    "models.merge_adapters": lambda m, p: logits(*models.merge_adapters(*adapted(m, p))),
    "models.regauge": lambda m, p: logits(*models.regauge(m, p, 3.0)),
    "models.save_pretrained": saved_and_loaded,
    "rollout.generate": sampled,
    "train.fresh_state": lambda m, p: logits(m, fresh_state(m, p, OptimConfig(), "joint").params),
}


def is_door(function):
    """Whether it is a function of a model and of its parameters."""
    if not inspect.isfunction(inspect.unwrap(function)):
        return False
    names = set(inspect.signature(function).parameters)
    return "model" in names and bool(names & {"params", "before"})


def test_every_public_function_has_an_entry():
    public = {
        f"{room}.{name}"
        for room in PACKAGES
        for name, x in vars(importlib.import_module(f"jaxdyn.{room}")).items()
        if not name.startswith("_") and is_door(x)
    }
    assert public == set(DOORS)


# Every door for one architecture: what is stored is made a view in one place, of all of them alike.
# The others where a door knows more of the layout than that. The twin has the untied layout.
CASES = [(door, "llama-tied") for door in DOORS] + [
    pytest.param(door, name, marks=pytest.mark.slow)
    for door, name in (
        ("dynamics.measure_update", "gpt_neox-tied"),
        ("kernels.log_prob_kernel", "gemma3_text-tied"),
        ("models.merge_adapters", "gpt_neox-tied"),
        ("models.save_pretrained", "gpt2-tied"),
        ("rollout.generate", "gemma3_text-tied"),
        ("train.fresh_state", "qwen2-tied"),
    )
]


@pytest.mark.parametrize(("door", "name"), CASES)
def test_stored_parameters_are_taken(door, name, x64):
    model, params = oracles.tiny_model(name)
    found, twin = DOORS[door](model, params), DOORS[door](*model.untie(params))
    assert all(np.isfinite(x).all() for x in found.values())
    assert any(np.any(x) for x in found.values())
    assert found.keys() == twin.keys()
    for part, x in found.items():
        atol = 1e-9 * max(1.0, float(np.abs(x).max()))
        np.testing.assert_allclose(x, twin[part], rtol=0, atol=atol, err_msg=part)
