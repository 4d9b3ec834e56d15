"""Adapters: an unchanged function at the start, W + s A B after, and what refuses them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax.traverse_util import flatten_dict

from jaxdyn.models import LoraConfig, add_adapters, has_adapters, merge_adapters
from jaxdyn.types import JaxdynError

CONFIG = LoraConfig(rank=3, alpha=4.5)
WHERE = {"backbone": True, "classifier": True}


def fresh(name, config=CONFIG, dtype=jnp.float64, **where):
    """A tiny model and what it is with adapters, as stored."""
    model, params = oracles.tiny_model(name, dtype)
    return model, params, *add_adapters(model, params, config, jax.random.key(1), **(WHERE | where))


def logits(model, params):
    return oracles.site_logits(model, model.view(params), oracles.tiny_sites())


def test_shapes_and_the_start():
    model, params, after, start = fresh("llama-tied", dtype=jnp.float32)
    leaves = flatten_dict(start)
    added = leaves.keys() - flatten_dict(params).keys()
    shapes = {path: leaves[path].shape for path in added}
    width, mlp = model.config.width, model.config.mlp_width
    assert len(added) == 2 * (7 + 1)
    assert shapes["backbone", "layers", "mlp", "up", "lora_a"] == (2, width, 3)
    assert shapes["backbone", "layers", "mlp", "up", "lora_b"] == (2, 3, mlp)
    assert shapes["backbone", "layers", "attention", "key", "lora_b"] == (2, 3, width // 2)
    assert shapes["classifier", "lora_a"] == (3, width)
    assert shapes["classifier", "lora_b"] == (oracles.VOCAB, 3)
    assert all((path[-1] == "lora_b") == (not leaves[path].any()) for path in added)
    assert after.config.lora_scale == 1.5
    # B = 0 leaves every bit: the low-rank path adds zeros.
    np.testing.assert_array_equal(logits(after, start), logits(model, params))
    assert not has_adapters(params) and has_adapters(start)


def test_draws_have_unit_gain_and_do_not_depend_on_each_other(x64):
    model, params, _, both = fresh("gpt_neox-untied", LoraConfig(rank=500))
    a = both["backbone"]["layers"]["mlp"]["down"]["lora_a"]  # [2, 32, 500]
    # 32 000 draws of variance 1/32: the mean square's standard error is √(2/32000) of it.
    assert abs(32 * float(jnp.mean(a**2)) - 1) < 5 * (2 / a.size) ** 0.5
    config = LoraConfig(rank=500, targets=("down",))
    _, alone = add_adapters(
        model, params, config, jax.random.key(1), backbone=True, classifier=False
    )
    np.testing.assert_array_equal(alone["backbone"]["layers"]["mlp"]["down"]["lora_a"], a)
    added = flatten_dict(alone).keys() - flatten_dict(params).keys()
    assert {path[-2] for path in added} == {"down"}


@pytest.mark.parametrize("name", ["gpt_neox-untied", "gpt2-tied"])
def test_merging_gives_the_same_function(name, x64):
    """Against W + s A B written out for every layer; a tied model's head comes off."""
    base, params = oracles.tiny_model(name)
    after, far = oracles.adapted_model(name)
    model, merged = merge_adapters(after, far)
    assert not has_adapters(merged) and not model.config.tied and model.config.lora_scale == 1
    got, wanted = logits(model, merged), logits(after, far)
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13 * scale)
    assert float(jnp.abs(wanted - logits(base, params)).max()) > 0.1 * scale
    up, old = (tree["backbone"]["layers"]["mlp"]["up"] for tree in (merged, params))
    a, b = (far["backbone"]["layers"]["mlp"]["up"][n] for n in ("lora_a", "lora_b"))
    for layer in range(2):
        np.testing.assert_allclose(
            up["kernel"][layer], old["kernel"][layer] + 1.5 * a[layer] @ b[layer], atol=1e-15
        )
    head, own = far["classifier"], after.view(far)["classifier"]["weight"]
    np.testing.assert_allclose(
        merged["classifier"]["weight"], own + 1.5 * head["lora_b"] @ head["lora_a"], atol=1e-15
    )


def test_a_tied_model_stays_tied_without_an_adapter_in_the_head(x64):
    after, far = oracles.adapted_model("gpt2-tied", classifier=False)
    model, merged = merge_adapters(after, far)
    assert model.config.tied and merged["classifier"] == {}
    np.testing.assert_allclose(logits(model, merged), logits(after, far), rtol=0, atol=1e-12)
    untied, copied = after.untie(far)
    np.testing.assert_array_equal(logits(untied, copied), logits(after, far))


def test_decoding_takes_the_adapters_too(x64):
    """One step on a cache gives the feature of the full pass."""
    after, far = oracles.adapted_model("qwen2-untied")
    tokens = jnp.asarray([[3, 1, 4, 1]], jnp.int32)
    mask = jnp.ones((1, 4), bool)
    wanted = after.features(far["backbone"], tokens, mask)
    _, prompt = after.prefill(far["backbone"], tokens[:, :3], mask[:, :3])
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[..., :1, :]), prompt)
    position = jnp.asarray([3], jnp.int32)
    got, _ = after.decode(
        far["backbone"], tokens[:, 3], position, prompt, empty, mask, jnp.int32(0)
    )
    np.testing.assert_allclose(got, wanted[:, 3], rtol=0, atol=1e-12)


def test_bfloat16_keeps_its_dtype():
    after, far = oracles.adapted_model("gpt_neox-untied", dtype=jnp.float32)
    half = dataclasses.replace(after, dtype=jnp.bfloat16)
    sites = oracles.tiny_sites()
    features = half.features(far["backbone"], sites.tokens, sites.mask)
    assert features.dtype == jnp.bfloat16
    exact = after.features(far["backbone"], sites.tokens, sites.mask)
    # Two layers of products at 8 bits: a few per cent of the largest entry.
    rough = jnp.where(sites.mask[..., None], features.astype(jnp.float32) - exact, 0)
    assert float(jnp.abs(rough).max() / jnp.abs(exact).max()) < 0.05


def test_what_is_refused():
    for bad, message in (
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "lora.alpha must be positive, got 0"),
        ({"targets": ()}, "lora.targets must name layers among query"),
    ):
        with pytest.raises(JaxdynError, match=message):
            LoraConfig(**bad)
    model, params, after, start = fresh("gpt_neox-untied", dtype=jnp.float32)
    with pytest.raises(JaxdynError, match="have adapters already"):
        add_adapters(after, start, CONFIG, jax.random.key(0), **WHERE)
    gate = LoraConfig(targets=("gate",))
    with pytest.raises(JaxdynError, match=r"none of the layers of lora\.targets, gate"):
        add_adapters(model, params, gate, jax.random.key(0), **WHERE)
