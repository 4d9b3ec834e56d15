"""GPT-NeoX, the Pythia family: parallel residual, partial rotary positions, biases."""

from jaxdyn.models.families.family import SIZES, Family
from jaxdyn.models.hf_fields import Field, activation, flag, number

GPT_NEOX = Family(
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    fields=(
        *SIZES,
        Field("num_attention_heads", "num_kv_heads"),
        Field("layer_norm_eps", "norm_eps", number, 1e-5),
        Field("hidden_act", "activation", activation, "gelu"),
        Field("use_parallel_residual", "parallel_residual", flag, True),
        Field("attention_bias", "qkv_bias", flag, True),
        Field("attention_bias", "attention_out_bias", flag, True),
        Field("tie_word_embeddings", "tied", flag, False),
    ),
    constant={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
    modules={
        "backbone/embed": "gpt_neox.embed_in",
        "backbone/layers/attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "backbone/layers/attention/query": "gpt_neox.layers.{}.attention.query_key_value",
        "backbone/layers/attention/key": "gpt_neox.layers.{}.attention.query_key_value",
        "backbone/layers/attention/value": "gpt_neox.layers.{}.attention.query_key_value",
        "backbone/layers/attention/out": "gpt_neox.layers.{}.attention.dense",
        "backbone/layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "backbone/layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "backbone/layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "backbone/norm": "gpt_neox.final_layer_norm",
        "classifier": "embed_out",
    },
    fused_by_head=True,
    rotary_fraction=0.25,
    rotary_names=("rotary_emb_base", "rotary_pct"),
)
gpt_neox = GPT_NEOX.config
