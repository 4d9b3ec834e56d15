"""OLMo 3: the norms of the second, and three layers of four with a window, rotated unscaled."""

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
from jaxdyn.models.hf_fields import Field, number
from jaxdyn.models.hf_layers import window_from_hf, window_size, window_to_hf


def _layers(data: dict[str, Any], count: int) -> dict[str, Any]:
    return window_from_hf(data, count, window_size(data, 4096), lambda number: number % 4 != 3)


OLMO3 = Family(
    model_type="olmo3",
    causal_lm="Olmo3ForCausalLM",
    fields=but((*GATED_FIELDS, *ATTENTION_BIAS), Field("rms_norm_eps", "norm_eps", number, 1e-5)),
    constant={
        **GATED,
        "mlp_bias": False,
        "query_key_norm": "projection",
        "norm_placement": "after",
    },
    modules=GATED_MATRICES | NORMS_AFTER | QUERY_KEY_NORMS,
    rotary_base=500000.0,
    window_rotary=("rope_theta", 500000.0),
    layers=_layers,
    layers_to_hf=window_to_hf,
)
olmo3 = OLMO3.config
