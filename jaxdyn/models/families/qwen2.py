"""Qwen2 and Qwen2.5: biases of query, key and value alone; the last layers may have a window."""

from jaxdyn.models.families.family import GATED, GATED_FIELDS, GATED_MODULES, Family
from jaxdyn.models.hf_layers import optional_window_from_hf, optional_window_to_hf

QWEN2 = Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    fields=GATED_FIELDS,
    constant={**GATED, "qkv_bias": True, "attention_out_bias": False, "mlp_bias": False},
    modules=GATED_MODULES,
    layers=optional_window_from_hf,
    layers_to_hf=optional_window_to_hf,
)
qwen2 = QWEN2.config
