"""PEFT adapters in every layout, against W + s B A written out on the checkpoint itself."""

import json

import jax
import numpy as np
import pytest
import tiny_checkpoints
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxdyn.models import LoraConfig, add_adapters, load_pretrained, merge_adapters
from jaxdyn.models.peft import add_peft, load_adapters, peft_directory, save_adapters
from jaxdyn.types import JaxdynError

# A fused matrix, one that is stored [in, out], separate ones; whether PEFT turns the product.
ADAPTED = {
    "gpt_neox_parallel": ("gpt_neox.layers.{}.attention.query_key_value", False),
    "gpt2_untied": ("transformer.h.{}.attn.c_attn", True),
    "llama_llama3_scaling": ("model.layers.{}.mlp.down_proj", False),
}


def adapter_of(tensors, name, rank=2):
    rng = np.random.default_rng(4)
    factors = {}
    for layer in range(2):
        shape = tensors[f"{name.format(layer)}.weight"].shape
        out, inner = shape[::-1] if "c_attn" in name else shape
        prefix = f"base_model.model.{name.format(layer)}.lora_"
        factors[f"{prefix}A.weight"] = rng.standard_normal((rank, inner)).astype(np.float32)
        factors[f"{prefix}B.weight"] = rng.standard_normal((out, rank)).astype(np.float32)
    return factors


def write(directory, factors, **changes):
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"} | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_adapter_is_its_product_in_the_checkpoint(name, rank_stabilised, tmp_path):
    config, (matrix, turned) = tiny_checkpoints.CONFIGS[name], ADAPTED[name]
    tensors = tiny_checkpoints.weights(config)
    factors = adapter_of(tensors, matrix)
    changes = {"use_rslora": rank_stabilised, "fan_in_fan_out": turned}
    adapter = write(tmp_path / "adapter", factors, **changes)
    scale = 6 / (2**0.5 if rank_stabilised else 2)
    merged = dict(tensors)
    for layer in range(2):
        base = f"base_model.model.{matrix.format(layer)}.lora_"
        product = scale * (factors[f"{base}B.weight"] @ factors[f"{base}A.weight"])
        own = f"{matrix.format(layer)}.weight"
        merged[own] = merged[own] + (product.T if turned else product)
    model, params = load_pretrained(tiny_checkpoints.write(tmp_path / "base", config, tensors))
    _, wanted = load_pretrained(tiny_checkpoints.write(tmp_path / "merged", config, merged))
    found = add_peft(model, params, adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.any(x != y)), found, params))
    assert sum(moved) == (3 if "query_key_value" in matrix or turned else 1)


def test_what_is_no_such_adapter_is_named(tmp_path):
    name = "llama_llama3_scaling"
    config, (matrix, _) = tiny_checkpoints.CONFIGS[name], ADAPTED[name]
    model, params = load_pretrained(tiny_checkpoints.write(tmp_path / "base", config))
    factors = adapter_of(tiny_checkpoints.weights(config), matrix)
    alone = {k: v for k, v in factors.items() if "lora_A" in k}
    wide = {k: v[:, :-1] if "lora_A" in k else v for k, v in factors.items()}
    other = {k.replace("down_proj", "fc_9"): v for k, v in factors.items()}
    for tensors, changes, said in [
        (factors, {"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        (factors, {"use_dora": True}, "use_dora is not supported, got True"),
        (factors, {"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        (factors, {"r": 0}, "needs a rank r of 1 to 65536 and a number lora_alpha, got 0 and 6"),
        (alone, {}, "has not both factors, lora_A and lora_B"),
        ({}, {}, "holds no adapter"),
        (wide, {}, "it belongs to another base model"),
        (other, {}, "it belongs to another base model"),
    ]:
        with pytest.raises(JaxdynError, match=said):
            add_peft(model, params, write(tmp_path / "adapter", tensors, **changes))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(JaxdynError, match="is not a whole safetensors file"):
        add_peft(model, params, tmp_path / "adapter")


BOTH = {"backbone": True, "classifier": True}


def trained(model, params, rank=2, alpha=3.0, seed=1, **where):
    """With adapters that are away from their start."""
    config = LoraConfig(rank, alpha)
    model, params = add_adapters(model, params, config, jax.random.key(0), **(BOTH | where))
    rng = np.random.default_rng(seed)
    draw = lambda path, x: (
        rng.standard_normal(x.shape).astype(np.float32) if "lora" in str(path) else x
    )
    return model, jax.tree_util.tree_map_with_path(draw, params)


@pytest.mark.parametrize("name", [*ADAPTED, "qwen2_tied"])
def test_adapters_are_written_and_read_again_to_the_bit(name, tmp_path):
    """What is written is W + s B A of the checkpoint; read beside the base it is what it was."""
    config = tiny_checkpoints.CONFIGS[name]
    base, params = load_pretrained(tiny_checkpoints.write(tmp_path / "base", config))
    model, start = trained(base, params)
    save_adapters(tmp_path / "adapter", model, start, "base")
    fresh = trained(base, params, seed=2)[1]
    again = load_adapters(model, fresh, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, again, start)
    assert flatten_dict(again).keys() == flatten_dict(start).keys()

    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (2, 3.0, "base")
    fused = "neox" in name or "gpt2" in name
    assert set(told["rank_pattern"].values()) == ({6} if fused else set())
    assert told["fan_in_fan_out"] == ("gpt2" in name)
    merged, wanted = merge_adapters(model, start)
    untied = base.untie(params)[1] if base.config.tied else params
    found = add_peft(merged, untied, tmp_path / "adapter")
    # Sums of two or six products of float32, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, wanted)


def test_an_adapter_that_peft_made_of_a_fused_matrix_is_trained_on(tmp_path):
    """Its three parts share A; function and weights are those of the merged one."""
    config = tiny_checkpoints.CONFIGS["gpt_neox_parallel"]
    name = ADAPTED["gpt_neox_parallel"][0]
    base, params = load_pretrained(tiny_checkpoints.write(tmp_path / "base", config))
    adapter = write(tmp_path / "adapter", adapter_of(tiny_checkpoints.weights(config), name))
    lora = LoraConfig(2, 6.0, ("query", "key", "value"))
    where = {"backbone": True, "classifier": False}
    model, start = add_adapters(base, params, lora, jax.random.key(0), **where)
    _, found = merge_adapters(model, load_adapters(model, start, adapter))
    wanted = add_peft(base, params, adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, wanted)

    for other, said in [
        (LoraConfig(3, 9.0, lora.targets), "lora.rank is 3; .* has rank 2 at"),
        (LoraConfig(2, 4.0, lora.targets), "lora.alpha / lora.rank is 2; .* has the scale 3 at"),
        (LoraConfig(2, 6.0), "^lora.targets adapts gpt_neox.layers.0.attention.dense.weight and"),
        (LoraConfig(2, 6.0, ("up",)), "adapts .*query_key_value.weight and lora.targets does not"),
    ]:
        model, start = add_adapters(base, params, other, jax.random.key(0), **where)
        with pytest.raises(JaxdynError, match=said):
            load_adapters(model, start, adapter)
    with pytest.raises(
        JaxdynError, match=r"model\.adapter must be the directory of a PEFT adapter"
    ):
        peft_directory(str(tmp_path / "base"))


def test_single_matrices_have_ranks_and_alphas_of_their_own(tmp_path):
    config = tiny_checkpoints.CONFIGS["llama_llama3_scaling"]
    name = ADAPTED["llama_llama3_scaling"][0]
    model, params = load_pretrained(tiny_checkpoints.write(tmp_path / "base", config))
    factors = adapter_of(tiny_checkpoints.weights(config), name)
    own = {"rank_pattern": {"1.mlp.down_proj": 2}, "alpha_pattern": {"1.mlp.down_proj": 8}}
    found = add_peft(model, params, write(tmp_path / "adapter", factors, r=2, **own))
    kernel = lambda p: np.asarray(p["backbone"]["layers"]["mlp"]["down"]["kernel"])
    moved = kernel(found) - kernel(params)
    for layer, scale in enumerate((3, 4)):
        base = f"base_model.model.{name.format(layer)}.lora_"
        product = scale * (factors[f"{base}B.weight"] @ factors[f"{base}A.weight"])
        np.testing.assert_allclose(moved[layer], product.T, rtol=0, atol=1e-5)
    odd = {"rank_pattern": {".*proj": 2}}
    with pytest.raises(JaxdynError, match="rank_pattern must name modules as they are"):
        add_peft(model, params, write(tmp_path / "adapter", factors, **odd))
