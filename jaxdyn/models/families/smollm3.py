"""SmolLM3: grouped queries, and no rotary positions in every fourth layer."""

from typing import Any

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.families.family import (
    ATTENTION_BIAS,
    GATED,
    GATED_FIELDS,
    GATED_MODULES,
    Family,
    but,
)
from jaxdyn.models.hf_fields import Field, flag, refuse, size
from jaxdyn.models.hf_layers import optional_window_to_hf, window_from_hf, window_size


def _layers(data: dict[str, Any], count: int) -> dict[str, Any]:
    """A window, if there is one, is had by the layers without rotary positions."""
    marks = data.get("no_rope_layers")
    if marks is None:
        every = size(data, "no_rope_layer_interval", 4)
        marks = [int((number + 1) % every != 0) for number in range(count)]
    if not isinstance(marks, list) or len(marks) < count or any(m not in (0, 1) for m in marks):
        refuse("no_rope_layers", marks, f"1 or 0, rotary or not, for each of {count} layers")
    rotated = tuple(bool(mark) for mark in marks[:count])
    window = window_size(data, None) if flag(data, "use_sliding_window", False) else None
    return {
        "rotated": () if all(rotated) else rotated,
        **window_from_hf(data, count, window, lambda n: bool(window) and not rotated[n]),
    }


def _layers_to_hf(config: ModelConfig) -> dict[str, Any]:
    marks = [int(rotated) for rotated in config.rotated_by_layer]
    return {"no_rope_layers": marks, **optional_window_to_hf(config)}


SMOLLM3 = Family(
    model_type="smollm3",
    causal_lm="SmolLM3ForCausalLM",
    fields=but(
        (*GATED_FIELDS, *ATTENTION_BIAS, Field("mlp_bias", "mlp_bias", flag, False)),
        Field("num_key_value_heads", "num_kv_heads"),
        Field("tie_word_embeddings", "tied", flag, True),
    ),
    constant=GATED,
    modules=GATED_MODULES,
    rotary_base=2000000.0,
    layers=_layers,
    layers_to_hf=_layers_to_hf,
)
smollm3 = SMOLLM3.config
