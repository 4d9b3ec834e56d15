"""Llama 1 to 3.2 and what has its shape, such as SmolLM2: no biases unless asked for."""

from jaxdyn.models.families.family import (
    ATTENTION_BIAS,
    GATED,
    GATED_FIELDS,
    GATED_MODULES,
    Family,
)
from jaxdyn.models.hf_fields import Field, flag

LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    fields=(*GATED_FIELDS, *ATTENTION_BIAS, Field("mlp_bias", "mlp_bias", flag, False)),
    constant=GATED,
    modules=GATED_MODULES,
    gated="LlamaForRewardModelWithGating",
)
llama = LLAMA.config
