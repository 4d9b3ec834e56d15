"""Qwen3: every head's queries and keys are normalised, and heads have a size of their own."""

from jaxdyn.models.families.family import GATED, GATED_FIELDS, GATED_MODULES, Family
from jaxdyn.models.hf_fields import Field, flag
from jaxdyn.models.hf_layers import optional_window_from_hf, optional_window_to_hf

OWN_SIZES = (Field("num_key_value_heads", "num_kv_heads"), Field("head_dim", "head_dim"))
QWEN3 = Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    fields=(
        *(field for field in GATED_FIELDS if field.ours not in ("num_kv_heads", "head_dim")),
        *OWN_SIZES,
        Field("attention_bias", "qkv_bias", flag, False),
        Field("attention_bias", "attention_out_bias", flag, False),
    ),
    constant={**GATED, "mlp_bias": False, "query_key_norm": "head"},
    modules=GATED_MODULES
    | {
        "backbone/layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
        "backbone/layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
    },
    layers=optional_window_from_hf,
    layers_to_hf=optional_window_to_hf,
)
qwen3 = QWEN3.config
