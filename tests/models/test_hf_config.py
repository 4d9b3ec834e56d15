"""config.json in and out: real models' shapes, both spellings, and refusals that name the field."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_checkpoints

from jaxdyn.models import (
    LanguageModel,
    RotaryScaling,
    config_from_hf,
    config_to_hf,
    gpt_neox,
)
from jaxdyn.models.families import FAMILIES
from jaxdyn.models.rotary import rotary_kinds
from jaxdyn.models.shapes import SHAPES
from jaxdyn.types import JaxdynError

PYTHIA_2_8B = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
LLAMA_3_2_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
QWEN_2_5_HALF_B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "tie_word_embeddings": True,
}
QWEN_3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
}
SMOLLM3_3B = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "rope_scaling": None,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "layer_types": ["full_attention"] * 36,
    "use_sliding_window": False,
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
}
OLMO_2_1B = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
OLMO_3_7B = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    },
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
    "sliding_window": 4096,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
}


@pytest.mark.parametrize(
    ("data", "parameters"),
    [
        (PYTHIA_2_8B, 2_775_208_960),
        (LLAMA_3_2_1B, 1_235_814_400),
        (QWEN_2_5_HALF_B, 494_032_768),
        (QWEN_3_0_6B, 596_049_920),
        (SMOLLM3_3B, 3_075_098_624),
        (OLMO_2_1B, 1_484_916_736),
        (OLMO_3_7B, 7_298_011_136),
        (GEMMA_3_1B, 999_885_952),
        (GPT2, 124_439_808),
    ],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else "",
)
def test_published_models_have_their_published_number_of_parameters(data, parameters):
    model = LanguageModel(config_from_hf(data))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_a_published_config_is_our_constructors():
    assert config_from_hf(QWEN_3_0_6B) == SHAPES["qwen3-0.6b"]
    assert config_from_hf(GEMMA_3_1B) == SHAPES["gemma-3-1b"]
    assert config_from_hf(PYTHIA_2_8B) == gpt_neox(
        vocab_size=50304, width=2560, num_layers=32, num_heads=32
    )
    assert config_from_hf(PYTHIA_2_8B).rotary_dim == 20


def test_both_spellings_of_rotary_positions_mean_the_same():
    old = {k: v for k, v in PYTHIA_2_8B.items() if not k.startswith("rotary")}
    new = {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}
    spelled_old = config_from_hf({**old, "rotary_pct": 0.5, "rotary_emb_base": 500})
    assert config_from_hf({**old, "rope_parameters": new}) == spelled_old
    # Inside wins over beside.
    both = {**old, "rotary_pct": 0.1, "rotary_emb_base": 7, "rope_parameters": new}
    assert config_from_hf(both) == spelled_old

    scaling = LLAMA_3_2_1B["rope_scaling"]
    rest = {k: v for k, v in LLAMA_3_2_1B.items() if k not in ("rope_scaling", "rope_theta")}
    spelled_new = config_from_hf({**rest, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert spelled_new == config_from_hf(LLAMA_3_2_1B)
    assert spelled_new.rotary_scaling == RotaryScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert spelled_new.rotary_base == 500000.0


def test_absent_fields_take_transformers_defaults():
    few = {k: v for k, v in LLAMA_3_2_1B.items() if k in tiny_checkpoints.CONFIGS["qwen2"]}
    del few["num_key_value_heads"], few["rms_norm_eps"], few["rope_theta"]
    config = config_from_hf({**few, "tie_word_embeddings": None})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (32, 64, 1e-6)
    assert (config.rotary_base, config.rotary_scaling, config.tied) == (10000.0, None, False)
    neox = {k: v for k, v in PYTHIA_2_8B.items() if not k.startswith("rotary")}
    assert config_from_hf(neox).rotary_fraction == 0.25
    assert config_from_hf(GPT2).tied
    assert config_from_hf(GPT2).mlp_width == 3072


def test_what_tells_published_models_layers_apart():
    """By hand: which layers have a window, which turn, and how fast."""
    fourth = (*[False] * 3, True) * 9
    smollm3 = config_from_hf(SMOLLM3_3B)
    assert smollm3.rotated == tuple(not x for x in fourth) and not smollm3.windowed
    silent = {k: v for k, v in SMOLLM3_3B.items() if k not in ("no_rope_layers", "layer_types")}
    assert config_from_hf(silent) == smollm3
    assert smollm3.tied and smollm3.rotary_base == 5e6

    olmo3 = config_from_hf(OLMO_3_7B)
    assert olmo3.windowed == tuple(not x for x in fourth[:32]) and olmo3.window == 4096
    assert (olmo3.rotary_base, olmo3.window_rotary_base) == (5e5, 5e5)
    without = {k: v for k, v in OLMO_3_7B["rope_scaling"].items() if k != "attention_factor"}
    assert config_from_hf({**OLMO_3_7B, "rope_scaling": without}) == olmo3
    kinds, of_layer = rotary_kinds(olmo3)
    assert len(kinds) == 2 and [x == of_layer[3] for x in of_layer] == [*fourth[:32]]
    near, whole = kinds[of_layer[0]], kinds[of_layer[3]]
    assert near[0] == 1 and whole[0] == pytest.approx(1 + 0.1 * np.log(8))
    # Components turn 32 times and once in 8192 slots at 18.2 and 35.0 of 64.
    np.testing.assert_allclose((whole / near)[1:20], 1)
    np.testing.assert_allclose((whole / near)[1 + 36 :], 1 / 8)
    between = (whole / near)[20:36]
    assert (np.diff(between) < 0).all() and 1 / 8 < between.min() < between.max() < 1

    gemma3 = config_from_hf(GEMMA_3_1B)
    assert gemma3.windowed == tuple(number % 6 != 5 for number in range(26))
    assert (gemma3.window, gemma3.attention_scalar, gemma3.tied) == (512, 256, True)
    assert (gemma3.rotary_base, gemma3.window_rotary_base) == (1e6, 1e4)
    named = {"_sliding_window_pattern": 6, "sliding_window_pattern": None}
    assert config_from_hf({**GEMMA_3_1B, **named}) == gemma3


@pytest.mark.parametrize("name", tiny_checkpoints.CONFIGS)
def test_to_hugging_face_and_back_is_the_same(name):
    config = config_from_hf(tiny_checkpoints.CONFIGS[name])
    data = config_to_hf(config, bos_token_id=0, stop_ids=(5,))
    assert config_from_hf(data) == config
    assert (data["bos_token_id"], data["eos_token_id"]) == (0, 5)
    assert config_to_hf(config, stop_ids=(5, 6))["eos_token_id"] == [5, 6]
    assert config_to_hf(config)["eos_token_id"] is None
    # Either spelling alone suffices, so that old and new versions of transformers agree.
    for spelling in ("rope_scaling", "rope_parameters"):
        without = {k: v for k, v in data.items() if k != spelling}
        assert config_from_hf(without) == config


@pytest.mark.parametrize("name", tiny_checkpoints.CONFIGS)
@pytest.mark.parity
def test_transformers_reads_the_same_rotary_settings(name):
    transformers = pytest.importorskip("transformers")
    config = config_from_hf(tiny_checkpoints.CONFIGS[name])
    if not config.rotary_dim:
        pytest.skip("learned positions")
    data = config_to_hf(config)
    theirs = transformers.AutoConfig.for_model(data.pop("model_type"), **data).rope_parameters
    if config.window_rotary_base is not None:
        near = theirs["sliding_attention"]
        assert near == {"rope_type": "default", "rope_theta": config.window_rotary_base}
        theirs = theirs["full_attention"]
    assert theirs["rope_theta"] == config.rotary_base
    assert theirs.get("partial_rotary_factor", 1.0) == config.rotary_fraction
    kind = config.rotary_scaling.kind if config.rotary_scaling else "default"
    assert theirs["rope_type"] == kind


LLAMA = LLAMA_3_2_1B
REFUSED = [
    (
        LLAMA,
        {"model_type": "mistral"},
        "model_type = 'mistral'",
        ", ".join(FAMILIES),
    ),
    (LLAMA, {"model_type": None}, "no model_type", ""),
    (LLAMA, {"hidden_size": None}, "no hidden_size", ""),
    (LLAMA, {"hidden_size": "big"}, "hidden_size = 'big'", "a whole number from 1"),
    (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers = 0", "a whole number from 1"),
    (LLAMA, {"vocab_size": True}, "vocab_size = True", "a whole number from 1"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps = 0", "a number above 0"),
    (LLAMA, {"rope_theta": float("nan")}, "rope_theta = nan", "a number above 0"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias = 'yes'", "true or false"),
    (LLAMA, {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'", "gelu"),
    (
        LLAMA,
        {"rope_scaling": {"type": "longrope"}},
        "rope_scaling.type = 'longrope'",
        "llama3, yarn",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
        "rope_scaling.mscale = 1.0",
        "none",
    ),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "rope_scaling.truncate = False",
        "true",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "no rope_scaling.factor", ""),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling = 'linear'", "one set of parameters"),
    (
        LLAMA,
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "rope_parameters = {'full_attention'",
        "one set of parameters",
    ),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5", "1"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}", "none"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8", "none"),
    (LLAMA, {"num_key_value_heads": 5}, "num_heads (32)", "num_kv_heads (5)"),
    (PYTHIA_2_8B, {"rotary_pct": 1.5}, "partial_rotary_factor = 1.5", "up to 1"),
    (PYTHIA_2_8B, {"num_attention_heads": 48}, "num_heads (48)", "width (2560) must be a multiple"),
    (
        QWEN_2_5_HALF_B,
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = ['full_attention', 'sliding_attention']",
        "full_attention in every layer where there is no sliding_window",
    ),
    (
        QWEN_2_5_HALF_B,
        {"num_hidden_layers": 2, "layer_types": ["full_attention"]},
        "layer_types = ['full_attention']",
        "for each of 2 layers",
    ),
    (
        QWEN_2_5_HALF_B,
        {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
        "layer_types = ['chunked_attention']",
        "full_attention or sliding_attention",
    ),
    (
        QWEN_2_5_HALF_B,
        {"use_sliding_window": True, "sliding_window": 0},
        "sliding_window = 0",
        "a whole number from 1",
    ),
    (LLAMA, {"model_type": "gemma2"}, "model_type = 'gemma2'", "f = cap tanh(Wφ / cap)"),
    (LLAMA, {"model_type": "gemma3"}, "model_type = 'gemma3'", "its language model alone"),
    (GEMMA_3_1B, {"use_bidirectional_attention": True}, "attention = True", "false"),
    (GEMMA_3_1B, {"sliding_window": None, "layer_types": None}, "window = None", "number from 1"),
    (GEMMA_3_1B, {"head_dim": None}, "no head_dim", ""),
    (
        GEMMA_3_1B,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
        "rope_parameters.sliding_attention.rope_type = 'linear'",
        "default",
    ),
    (
        GEMMA_3_1B,
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
        "rope_parameters.full_attention.rope_type = 'dynamic'",
        "default, linear, llama3, yarn",
    ),
    (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0]", "each of 36 layers"),
    (SMOLLM3_3B, {"no_rope_layers": [2] * 36}, "no_rope_layers = [2, 2", "1 or 0"),
    (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0", "none"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0", "none"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx = True", "false"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = False", "true"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention = True", "false"),
]


@pytest.mark.parametrize(("base", "change", "named", "supported"), REFUSED)
def test_what_we_do_not_compute_is_refused_by_name(base, change, named, supported):
    with pytest.raises(JaxdynError) as error:
        config_from_hf({**base, **change})
    message = str(error.value)
    assert named in message
    assert supported in message
    assert "\n" not in message


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle():
    unused = {**QWEN_2_5_HALF_B, "use_sliding_window": True, "max_window_layers": 24}
    assert config_from_hf(unused) == config_from_hf(QWEN_2_5_HALF_B)


def test_a_configuration_the_family_cannot_express_is_not_exported():
    parallel_llama = dataclasses.replace(config_from_hf(LLAMA), parallel_residual=True)
    with pytest.raises(JaxdynError, match="cannot express parallel_residual = True"):
        config_to_hf(parallel_llama)
    biased = dataclasses.replace(config_from_hf(GPT2), classifier_bias=True)
    with pytest.raises(JaxdynError, match="cannot express classifier_bias = True"):
        config_to_hf(biased)
