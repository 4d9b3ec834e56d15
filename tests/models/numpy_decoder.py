"""Llama, Qwen2, Qwen3 and GPT-NeoX by hand: one sequence, float64, from a checkpoint's tensors.

Written after the papers and transformers' files, and not after jaxdyn: without batches, padding,
scans, caches or fused products.
"""

import math

import numpy as np


def features(config, tensors, ids):
    """φ [T, D] of the token ids [T]."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    return (_neox if config["model_type"] == "gpt_neox" else _llama)(config, w, np.asarray(ids))


def _llama(c, w, ids):
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    size, eps = c.get("head_dim", c["hidden_size"] // heads), c["rms_norm_eps"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * w[f"{name}.weight"]

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            dense(y, f"{layer}.self_attn.{n}_proj").reshape(len(ids), count, size)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if f"{layer}.self_attn.q_norm.weight" in w:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = (_rotate(z, size, c.get("rope_theta", 10000.0)) for z in (q, k))
        each = [
            _attend(q[:, h], k[:, h * kv_heads // heads], v[:, h * kv_heads // heads])
            for h in range(heads)
        ]
        x = x + dense(np.concatenate(each, axis=1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = dense(y, f"{layer}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + dense(gate * dense(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return norm(x, "model.norm")


def _neox(c, w, ids):
    heads, width = c["num_attention_heads"], c["hidden_size"]
    size = width // heads
    rotated = int(size * c["rotary_pct"])

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["gpt_neox.embed_in.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        y = dense(norm(x, f"{layer}.input_layernorm"), f"{layer}.attention.query_key_value")
        q, k, v = np.moveaxis(y.reshape(len(ids), heads, 3, size), 2, 0)
        q, k = (_rotate(z, rotated, c["rotary_emb_base"]) for z in (q, k))
        each = [_attend(q[:, h], k[:, h], v[:, h]) for h in range(heads)]
        attended = dense(np.concatenate(each, axis=1), f"{layer}.attention.dense")
        y = dense(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h")
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = x + attended + dense(y, f"{layer}.mlp.dense_4h_to_h")
    return norm(x, "gpt_neox.final_layer_norm")


def _rotate(z, size, base):
    """The first `size` components of each head [T, heads, ...], halves against each other."""
    angles = np.arange(len(z))[:, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b, rest = z[..., : size // 2], z[..., size // 2 : size], z[..., size:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _attend(q, k, v):
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v
