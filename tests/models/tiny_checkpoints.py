"""Tiny checkpoints of every family: configs as the hub has them, weights from a frozen stream.

The names and shapes are written down here apart from the package's own, and the weights are not
stored: numpy promises that `RandomState` never changes, so the same name always gets the same
numbers. Both the references and the tests start from here.
"""

import json
import zlib

import numpy as np
from safetensors.numpy import save_file

_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN2 = {**_LLAMA, "model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False}
_QWEN3 = {**_LLAMA, "model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 10}
_OLMO2 = {**_LLAMA, "model_type": "olmo2"}
_OLMO3 = {**_LLAMA, "model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 3}
_SMOLLM3 = {**_LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": None}
_GEMMA3 = {
    **{name: value for name, value in _LLAMA.items() if name != "hidden_act"},
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "head_dim": 10,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 14,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 3,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 41,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
# Wavelengths of a head of 16 run from 6 to 2e4: below 16 kept, above 64 divided, blended between.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Of a head of 6 with base 500000, wavelengths of 6, 500 and 4e4: kept, blended, divided.
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4,
    "beta_slow": 1,
}

CONFIGS = {
    "gpt_neox_parallel": {**_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "gpt_neox_sequential": {
        **_NEOX,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "gpt_neox_tied": {**_NEOX, "rotary_pct": 1.0, "tie_word_embeddings": True},
    "llama_llama3_scaling": {
        **_LLAMA,
        "head_dim": 16,
        "rope_parameters": {**_LLAMA3, "rope_theta": 10000.0},
    },
    "llama_tied_linear_scaling": {
        **_LLAMA,
        "hidden_size": 32,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "qwen2": {**_QWEN2, "rope_theta": 1000000.0},
    "qwen2_tied": {
        **_QWEN2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3": {**_QWEN3, "attention_bias": True, "rope_theta": 1000000.0},
    "qwen3_tied_window": {
        **_QWEN3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "olmo2": {**_OLMO2, "rope_theta": 500000.0},
    "olmo2_tied": {
        **_OLMO2,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "olmo3_yarn": {**_OLMO3, "rope_theta": 500000.0, "rope_scaling": _YARN},
    "olmo3_tied": {
        **_OLMO3,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
        "rope_parameters": {
            "full_attention": {**_YARN, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "smollm3": {**_SMOLLM3, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0] * 2},
    "smollm3_tied_window": {
        **_SMOLLM3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "no_rope_layer_interval": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "gemma3": {
        **_GEMMA3,
        "attention_bias": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3_tied": {
        **_GEMMA3,
        "tie_word_embeddings": True,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    "gpt2_tied": _GPT2,
    "gpt2_untied": {**_GPT2, "n_inner": 40, "tie_word_embeddings": False},
}


def shapes(config):
    """Names and shapes of the tensors in a checkpoint of this config."""
    family = {"gpt_neox": _neox_shapes, "gpt2": _gpt2_shapes}
    return family.get(config["model_type"], _llama_shapes)(config)


def weights(config, seed=0):
    """Random float32 weights: gains around 1, matrices that keep a vector's length, biases 0.1."""
    tensors = {}
    for name, shape in shapes(config).items():
        stream = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
        noise = stream.standard_normal(shape)
        if name.endswith(".bias"):
            tensor = 0.1 * noise
        elif len(shape) == 1:
            tensor = ("gemma" not in config["model_type"]) + 0.1 * noise
        else:
            inner = shape[0] if config["model_type"] == "gpt2" and ".c_" in name else shape[1]
            tensor = noise / inner**0.5
        tensors[name] = tensor.astype(np.float32)
    return tensors


def write(directory, config, tensors=None):
    """A checkpoint's directory, as the hub would have it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = weights(config) if tensors is None else tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def batch(vocab_size=41, slots=10):
    """Four sequences: whole, padded on the left by 3 and by 7 slots, and on the right by 4."""
    stream = np.random.RandomState(1)
    tokens = stream.randint(0, vocab_size, (4, slots)).astype(np.int32)
    mask = np.ones((4, slots), bool)
    mask[1, :3] = mask[2, :7] = mask[3, -4:] = False
    return tokens, mask


def _linear(name, out, inner, bias):
    return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def _layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _neox_shapes(c):
    width, inner, bias = c["hidden_size"], c["intermediate_size"], c.get("attention_bias", True)
    found = {"gpt_neox.embed_in.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        found |= _layer_norm(f"{layer}.input_layernorm", width)
        found |= _layer_norm(f"{layer}.post_attention_layernorm", width)
        found |= _linear(f"{layer}.attention.query_key_value", 3 * width, width, bias)
        found |= _linear(f"{layer}.attention.dense", width, width, bias)
        found |= _linear(f"{layer}.mlp.dense_h_to_4h", inner, width, True)
        found |= _linear(f"{layer}.mlp.dense_4h_to_h", width, inner, True)
    found |= _layer_norm("gpt_neox.final_layer_norm", width)
    if not c["tie_word_embeddings"]:
        found["embed_out.weight"] = (c["vocab_size"], width)
    return found


def _llama_shapes(c):
    width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head, kv_heads = c.get("head_dim", width // heads), c["num_key_value_heads"]
    kind = c["model_type"]
    qwen2 = kind == "qwen2"
    of_heads = {"q_norm": head, "k_norm": head}
    of_projections = {"q_norm": heads * head, "k_norm": kv_heads * head}
    inner_norms = {"qwen3": of_heads, "gemma3_text": of_heads}.get(
        kind, of_projections if "olmo" in kind else {}
    )
    norms = ["post_attention_layernorm"]
    norms += ["post_feedforward_layernorm"] if "olmo" in kind else ["input_layernorm"]
    if "gemma" in kind:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    bias, mlp_bias = c.get("attention_bias", False), c.get("mlp_bias", False)
    found = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}.weight": (width,) for norm in norms}
        found |= {f"{layer}.self_attn.{n}.weight": (size,) for n, size in inner_norms.items()}
        found |= _linear(f"{layer}.self_attn.q_proj", heads * head, width, bias or qwen2)
        found |= _linear(f"{layer}.self_attn.k_proj", kv_heads * head, width, bias or qwen2)
        found |= _linear(f"{layer}.self_attn.v_proj", kv_heads * head, width, bias or qwen2)
        found |= _linear(f"{layer}.self_attn.o_proj", width, heads * head, bias)
        found |= _linear(f"{layer}.mlp.gate_proj", inner, width, mlp_bias)
        found |= _linear(f"{layer}.mlp.up_proj", inner, width, mlp_bias)
        found |= _linear(f"{layer}.mlp.down_proj", width, inner, mlp_bias)
    found["model.norm.weight"] = (width,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], width)
    return found


def _gpt2_shapes(c):
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    found = {
        "transformer.wte.weight": (c["vocab_size"], width),
        "transformer.wpe.weight": (c["n_positions"], width),
    }
    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}"
        found |= _layer_norm(f"{layer}.ln_1", width) | _layer_norm(f"{layer}.ln_2", width)
        for name, shape in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            found |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[1:]}
    found |= _layer_norm("transformer.ln_f", width)
    if not c.get("tie_word_embeddings", True):
        found["lm_head.weight"] = (c["vocab_size"], width)
    return found
