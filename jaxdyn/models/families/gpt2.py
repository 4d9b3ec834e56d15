"""GPT-2: learned positions, and matrices that checkpoints keep as we do."""

from jaxdyn.models.families.family import Family
from jaxdyn.models.hf_fields import Field, activation, flag, layers, number

GPT2 = Family(
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("n_embd", "width"),
        Field("n_layer", "num_layers", layers),
        Field("n_head", "num_heads"),
        Field("n_head", "num_kv_heads"),
        Field("n_inner", "mlp_width", default=None),
        Field("n_positions", "max_positions"),
        Field("layer_norm_epsilon", "norm_eps", number, 1e-5),
        Field("activation_function", "activation", activation, "gelu_new"),
        Field("tie_word_embeddings", "tied", flag, True),
    ),
    constant={
        "norm": "layer",
        "gated_mlp": False,
        "parallel_residual": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    modules={
        "backbone/embed": "transformer.wte",
        "backbone/position": "transformer.wpe",
        "backbone/layers/attention_norm": "transformer.h.{}.ln_1",
        "backbone/layers/attention/query": "transformer.h.{}.attn.c_attn",
        "backbone/layers/attention/key": "transformer.h.{}.attn.c_attn",
        "backbone/layers/attention/value": "transformer.h.{}.attn.c_attn",
        "backbone/layers/attention/out": "transformer.h.{}.attn.c_proj",
        "backbone/layers/mlp_norm": "transformer.h.{}.ln_2",
        "backbone/layers/mlp/up": "transformer.h.{}.mlp.c_fc",
        "backbone/layers/mlp/down": "transformer.h.{}.mlp.c_proj",
        "backbone/norm": "transformer.ln_f",
        "classifier": "lm_head",
    },
    scores="GPT2ForSequenceClassification",
    transposed=False,
    rotary_fraction=0.0,
)
gpt2 = GPT2.config
