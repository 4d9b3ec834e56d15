"""Logits equal transformers', from committed references and, with torch at hand, live."""

import functools

import jax
import jax.numpy as jnp
import make_references
import numpy as np
import pytest
import tiny_checkpoints

from jaxdyn.models import load_pretrained, save_pretrained

NAMES = list(tiny_checkpoints.CONFIGS)
TOLERANCE = 1e-4


@functools.cache
def references():
    with np.load(make_references.REFERENCES, allow_pickle=False) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, mask):
    view = model.view(params)
    return model.logits(view["classifier"], model.features(view["backbone"], tokens, mask))


def our_logits(directory, **options):
    model, params = load_pretrained(directory, **options)
    return np.asarray(run(model, params, *map(jnp.asarray, tiny_checkpoints.batch())))


def largest_difference(ours, theirs):
    _, mask = tiny_checkpoints.batch()
    return np.abs(ours - theirs)[mask].max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_committed_references(name, tmp_path):
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.CONFIGS[name])
    assert largest_difference(our_logits(tmp_path), references()[name]) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt_neox_tied", "gemma3_tied", "gpt2_tied"])
def test_logits_of_an_untied_load_are_the_same(name, tmp_path):
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.CONFIGS[name])
    model, params = load_pretrained(tmp_path, untie=True)
    assert not model.config.tied
    assert params["classifier"]["weight"].shape == (model.config.vocab_size, model.config.width)
    ours = our_logits(tmp_path, untie=True)
    assert largest_difference(ours, references()[name]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt_neox_parallel", {"use_parallel_residual": False}),
        ("gpt_neox_parallel", {"rotary_pct": 0.25}),
        ("llama_llama3_scaling", {"rope_parameters": {"rope_theta": 10000.0}}),
        ("llama_tied_linear_scaling", {"rope_scaling": None}),
        ("gpt2_tied", {"activation_function": "gelu"}),
        ("qwen3_tied_window", {"sliding_window": 4}),
        ("olmo3_yarn", {"rope_scaling": None}),
        ("olmo3_yarn", {"sliding_window": 4}),
        ("smollm3", {"no_rope_layers": [0, 1] * 2}),
        ("smollm3_tied_window", {"use_sliding_window": False}),
        ("gemma3", {"query_pre_attn_scalar": 10}),
        ("gemma3_tied", {"rope_local_base_freq": 1000}),
        ("gemma3_tied", {"sliding_window_pattern": 3}),
    ],
)
def test_the_references_tell_a_wrong_config_apart(name, change, tmp_path):
    """So the parity above is not won by a quantity too small to matter."""
    tiny_checkpoints.write(
        tmp_path,
        {**tiny_checkpoints.CONFIGS[name], **change},
        tiny_checkpoints.weights(tiny_checkpoints.CONFIGS[name]),
    )
    assert largest_difference(our_logits(tmp_path), references()[name]) > TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_live_logits_equal_the_committed_references(name, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.CONFIGS[name])
    theirs = make_references.logits(make_references.load(tmp_path))
    assert largest_difference(theirs, references()[name]) < 1e-5
    assert largest_difference(our_logits(tmp_path), theirs) < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_bytes", [2_000_000_000, 20_000])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_our_export(name, max_shard_bytes, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tiny_checkpoints.write(tmp_path / "in", tiny_checkpoints.CONFIGS[name])
    model, params = load_pretrained(tmp_path / "in")
    save_pretrained(
        tmp_path / "out",
        model,
        params,
        bos_token_id=1,
        stop_ids=(2, 3),
        max_shard_bytes=max_shard_bytes,
    )
    exported = make_references.load(tmp_path / "out")
    original = make_references.logits(make_references.load(tmp_path / "in"))
    assert largest_difference(make_references.logits(exported), original) == 0
    assert exported.generation_config.eos_token_id == [2, 3]
    assert exported.generation_config.bos_token_id == 1
