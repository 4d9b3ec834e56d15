"""Qwen2 and Qwen2.5: biases of query, key and value alone, and no layer with a window."""

from typing import Any

from jaxdyn.models.families.family import GATED, GATED_FIELDS, GATED_MODULES, Family
from jaxdyn.models.hf_fields import flag, refuse, size


def refuse_sliding_window(data: dict[str, Any], ours: dict[str, Any]) -> None:
    """Layer types decide where they are given; else the window begins at `max_window_layers`."""
    kinds = data.get("layer_types")
    if kinds is not None:
        if any(kind != "full_attention" for kind in kinds):
            refuse("layer_types", kinds, "full_attention in every layer")
        return
    windowed = (
        flag(data, "use_sliding_window", False) and data.get("sliding_window", 4096) is not None
    )
    if windowed and size(data, "max_window_layers", 28) < ours["num_layers"]:
        refuse("use_sliding_window", True, "false, or max_window_layers of at least num_layers")


QWEN2 = Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    fields=GATED_FIELDS,
    constant={**GATED, "qkv_bias": True, "attention_out_bias": False, "mlp_bias": False},
    modules=GATED_MODULES,
    check=refuse_sliding_window,
)
qwen2 = QWEN2.config
