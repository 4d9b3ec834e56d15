"""Qwen3: every head's queries and keys are normalised, and heads have a size of their own."""

from jaxdyn.models.families.family import (
    ATTENTION_BIAS,
    GATED,
    GATED_FIELDS,
    GATED_MODULES,
    QUERY_KEY_NORMS,
    Family,
    but,
)
from jaxdyn.models.hf_fields import Field
from jaxdyn.models.hf_layers import optional_window_from_hf, optional_window_to_hf

QWEN3 = Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    fields=but(
        (*GATED_FIELDS, *ATTENTION_BIAS),
        Field("num_key_value_heads", "num_kv_heads"),
        Field("head_dim", "head_dim"),
    ),
    constant={**GATED, "mlp_bias": False, "query_key_norm": "head"},
    modules=GATED_MODULES | QUERY_KEY_NORMS,
    layers=optional_window_from_hf,
    layers_to_hf=optional_window_to_hf,
)
qwen3 = QWEN3.config
