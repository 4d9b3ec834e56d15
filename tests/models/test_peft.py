"""PEFT adapters in every layout, against W + s B A written out on the checkpoint itself."""

import json

import jax
import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import save_file

from jaxdyn.models import load_pretrained
from jaxdyn.models.peft import add_peft
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
