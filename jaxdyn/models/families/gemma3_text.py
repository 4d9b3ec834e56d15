"""Gemma 3, text alone: (1 + s) norms before and after, a window in five layers of six.

Embeddings are multiplied by √width, every head's queries and keys are normalised, and layers with a
window have a rotary base of their own.
"""

from typing import Any

from jaxdyn.models.families.family import (
    ATTENTION_BIAS,
    GATED,
    GATED_FIELDS,
    GATED_MATRICES,
    NORMS_AFTER,
    QUERY_KEY_NORMS,
    Family,
    but,
)
from jaxdyn.models.hf_fields import Field, activation, flag, size
from jaxdyn.models.hf_layers import window_from_hf, window_size, window_to_hf


def _layers(data: dict[str, Any], count: int) -> dict[str, Any]:
    every = 6
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        every = size(data, name, every)
    window = window_size(data, 4096)
    return window_from_hf(data, count, window, lambda number: (number + 1) % every != 0)


def _tanh_by_its_name_here(name: str) -> str:
    return "gelu_pytorch_tanh" if name == "gelu_new" else name


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    fields=but(
        (*GATED_FIELDS, *ATTENTION_BIAS),
        Field("num_key_value_heads", "num_kv_heads"),
        Field("head_dim", "head_dim"),
        Field("hidden_activation", "activation", activation, "gelu_new", _tanh_by_its_name_here),
        Field("query_pre_attn_scalar", "attention_scalar", size, 256),
        Field("tie_word_embeddings", "tied", flag, True),
    ),
    constant={
        **GATED,
        "norm": "zero_centered_rms",
        "mlp_bias": False,
        "query_key_norm": "head",
        "norm_placement": "both",
        "scaled_embedding": True,
    },
    modules={
        **GATED_MATRICES,
        **NORMS_AFTER,
        **QUERY_KEY_NORMS,
        "backbone/layers/attention_norm": "model.layers.{}.input_layernorm",
        "backbone/layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    },
    scores="Gemma3TextForSequenceClassification",
    rotary_base=1000000.0,
    window_rotary=("rope_local_base_freq", 10000.0),
    layers=_layers,
    layers_to_hf=window_to_hf,
)
gemma3_text = GEMMA3_TEXT.config
