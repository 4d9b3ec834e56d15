"""OLMo 2: what attention and MLP write is normalised, and whole projections of queries and keys."""

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

OLMO2 = Family(
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    fields=but((*GATED_FIELDS, *ATTENTION_BIAS), Field("rms_norm_eps", "norm_eps", number, 1e-5)),
    constant={
        **GATED,
        "mlp_bias": False,
        "query_key_norm": "projection",
        "norm_placement": "after",
    },
    modules=GATED_MATRICES | NORMS_AFTER | QUERY_KEY_NORMS,
)
olmo2 = OLMO2.config
