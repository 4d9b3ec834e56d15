"""OLMo 3: its forerunner's norms, and three layers of four with a window and unscaled positions."""

import dataclasses
from typing import Any

from jaxdyn.models.families.olmo2 import OLMO2 as FORERUNNER
from jaxdyn.models.hf_layers import window_from_hf, window_size, window_to_hf


def _layers(data: dict[str, Any], count: int) -> dict[str, Any]:
    return window_from_hf(data, count, window_size(data, 4096), lambda number: number % 4 != 3)


OLMO3 = dataclasses.replace(
    FORERUNNER,
    model_type="olmo3",
    causal_lm="Olmo3ForCausalLM",
    rotary_base=500000.0,
    window_rotary=("rope_theta", 500000.0),
    layers=_layers,
    layers_to_hf=window_to_hf,
)
olmo3 = OLMO3.config
