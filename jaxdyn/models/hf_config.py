"""`config.json` of the four families, to and from `ModelConfig`: one table for both directions.

Two spellings of rotary positions are in use: transformers up to 4 has `rope_theta`, `rope_scaling`
and, for GPT-NeoX, `rotary_pct` and `rotary_emb_base`; transformers 5 has `rope_parameters` with
everything inside. Both are read, and both are written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxdyn.models.config import ModelConfig, RotaryScaling
from jaxdyn.models.hf_fields import REQUIRED, activation, flag, number, one_of, refuse, size
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class _Field:
    """`theirs` in config.json is `ours` in ModelConfig; one of theirs may stand for two of ours."""

    theirs: str
    ours: str
    read: Callable[[dict[str, Any], str, Any], Any] = size
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class _Family:
    """What varies in a family's configs, what never does, and its transformers class."""

    causal_lm: str
    fields: tuple[_Field, ...]
    constant: dict[str, Any]
    rotary: bool = True
    partial_rotary: bool = False


_SIZES = (
    _Field("vocab_size", "vocab_size"),
    _Field("hidden_size", "width"),
    _Field("num_hidden_layers", "num_layers"),
    _Field("num_attention_heads", "num_heads"),
    _Field("intermediate_size", "mlp_width"),
    _Field("max_position_embeddings", "max_positions"),
)
_GROUPED_AND_GATED = (
    *_SIZES,
    _Field("num_key_value_heads", "num_kv_heads", default=None),
    _Field("head_dim", "head_dim", default=None),
    _Field("rms_norm_eps", "norm_eps", number, 1e-6),
    _Field("hidden_act", "activation", activation, "silu"),
    _Field("tie_word_embeddings", "tied", flag, False),
)
_NO_ROTARY = {"rotary_fraction": 0.0, "rotary_base": 10000.0, "rotary_scaling": None}
_PLAIN_MLP = {"norm": "layer", "gated_mlp": False, "mlp_bias": True, "classifier_bias": False}
_GATED_MLP = {
    "norm": "rms",
    "gated_mlp": True,
    "parallel_residual": False,
    "classifier_bias": False,
}

_FAMILIES = {
    "gpt_neox": _Family(
        "GPTNeoXForCausalLM",
        (
            *_SIZES,
            _Field("num_attention_heads", "num_kv_heads"),
            _Field("layer_norm_eps", "norm_eps", number, 1e-5),
            _Field("hidden_act", "activation", activation, "gelu"),
            _Field("use_parallel_residual", "parallel_residual", flag, True),
            _Field("attention_bias", "qkv_bias", flag, True),
            _Field("attention_bias", "attention_out_bias", flag, True),
            _Field("tie_word_embeddings", "tied", flag, False),
        ),
        _PLAIN_MLP,
        partial_rotary=True,
    ),
    "llama": _Family(
        "LlamaForCausalLM",
        (
            *_GROUPED_AND_GATED,
            _Field("attention_bias", "qkv_bias", flag, False),
            _Field("attention_bias", "attention_out_bias", flag, False),
            _Field("mlp_bias", "mlp_bias", flag, False),
        ),
        _GATED_MLP,
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        _GROUPED_AND_GATED,
        {**_GATED_MLP, "qkv_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    "gpt2": _Family(
        "GPT2LMHeadModel",
        (
            _Field("vocab_size", "vocab_size"),
            _Field("n_embd", "width"),
            _Field("n_layer", "num_layers"),
            _Field("n_head", "num_heads"),
            _Field("n_head", "num_kv_heads"),
            _Field("n_inner", "mlp_width", default=None),
            _Field("n_positions", "max_positions"),
            _Field("layer_norm_epsilon", "norm_eps", number, 1e-5),
            _Field("activation_function", "activation", activation, "gelu_new"),
            _Field("tie_word_embeddings", "tied", flag, True),
        ),
        {
            **_PLAIN_MLP,
            **_NO_ROTARY,
            "parallel_residual": False,
            "qkv_bias": True,
            "attention_out_bias": True,
        },
        rotary=False,
    ),
}

# Fields that change the function in ways the decoder does not follow, and their one good value.
_FIXED = {
    "quantization_config": None,
    "num_experts": None,
    "num_local_experts": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def config_from_hf(data: dict[str, Any]) -> ModelConfig:
    """The decoder's configuration from the contents of a `config.json`.

    Raises JaxdynError naming the field, its value and what is supported, where the config asks for
    something the decoder does not compute.
    """
    family = _FAMILIES[one_of(data, "model_type", REQUIRED, _FAMILIES)]
    for name, good in _FIXED.items():
        if data.get(name) not in (None, good):
            refuse(name, data[name], "none" if good is None else str(good).lower())
    ours = {f.ours: f.read(data, f.theirs, f.default) for f in family.fields}
    ours |= family.constant
    if family.rotary:
        ours |= _rotary_from_hf(data, family.partial_rotary)
    if data["model_type"] == "qwen2":
        _refuse_sliding_window(data, ours["num_layers"])
    if ours.get("head_dim") is None:
        if ours["width"] % ours["num_heads"]:
            refuse("number of attention heads", ours["num_heads"], f"divisors of {ours['width']}")
        ours["head_dim"] = ours["width"] // ours["num_heads"]
    ours["num_kv_heads"] = ours["num_kv_heads"] or ours["num_heads"]
    ours["mlp_width"] = ours["mlp_width"] or 4 * ours["width"]
    return ModelConfig(architecture=data["model_type"], **ours)


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The contents of a `config.json` with which transformers builds the same function.

    Raises JaxdynError for a configuration that the family's `config.json` cannot express.
    """
    family = _FAMILIES[config.architecture]
    data = {
        "model_type": config.architecture,
        "architectures": [family.causal_lm],
        "dtype": "float32",
        **token_ids(bos_token_id, stop_ids),
        **{f.theirs: getattr(config, f.ours) for f in family.fields},
        **(_rotary_to_hf(config, family.partial_rotary) if family.rotary else {}),
    }
    again = config_from_hf(data)
    for name, value in vars(config).items():
        if getattr(again, name) != value:
            raise JaxdynError(
                f"a {config.architecture} config.json cannot express {name} = {value!r}; it would "
                f"be read back as {getattr(again, name)!r}"
            )
    return data


def token_ids(bos_token_id: int | None, stop_ids: Sequence[int]) -> dict[str, Any]:
    """How a sequence begins and ends, as `config.json` and `generation_config.json` say it."""
    stops = [int(i) for i in stop_ids]
    return {"bos_token_id": bos_token_id, "eos_token_id": stops if stops[1:] else (*stops, None)[0]}


def _rotary_from_hf(data: dict[str, Any], partial: bool) -> dict[str, Any]:
    """`rotary_fraction`, `rotary_base` and `rotary_scaling` from either spelling.

    As in transformers, what stands inside `rope_scaling` or `rope_parameters` wins over the fields
    beside it. Only GPT-NeoX rotates a part of each head, a quarter by default.
    """
    where = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(where) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(where, rope, "one set of parameters for all layers")
    data = {**data, where: rope}
    base = number(data, "rope_theta", 10000.0)
    fraction = number(data, "partial_rotary_factor", 0.25 if partial else 1.0)
    if partial:
        base = number(data, "rotary_emb_base", base)
        fraction = number(data, "rotary_pct", fraction)
    base = number(data, f"{where}.rope_theta", base)
    fraction = number(data, f"{where}.partial_rotary_factor", fraction)
    if fraction > 1 or (fraction < 1 and not partial):
        refuse("partial_rotary_factor", fraction, "up to 1" if partial else "1")
    kind = f"{where}.type" if "type" in rope and "rope_type" not in rope else f"{where}.rope_type"
    kind = one_of(data, kind, "default", ("default", "linear", "llama3"))
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling("linear", number(data, f"{where}.factor"))
    elif kind == "llama3":
        context = size(data, "max_position_embeddings")
        scaling = RotaryScaling(
            "llama3",
            factor=number(data, f"{where}.factor"),
            low_freq_factor=number(data, f"{where}.low_freq_factor"),
            high_freq_factor=number(data, f"{where}.high_freq_factor"),
            original_max_positions=size(data, f"{where}.original_max_position_embeddings", context),
        )
    return {"rotary_fraction": fraction, "rotary_base": base, "rotary_scaling": scaling}


def _rotary_to_hf(config: ModelConfig, partial: bool) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rotary_scaling is not None:
        s = config.rotary_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling["low_freq_factor"] = s.low_freq_factor
            scaling["high_freq_factor"] = s.high_freq_factor
            scaling["original_max_position_embeddings"] = s.original_max_positions
    base, fraction = config.rotary_base, config.rotary_fraction
    return {
        **({"rotary_emb_base": base, "rotary_pct": fraction} if partial else {"rope_theta": base}),
        "rope_scaling": scaling if config.rotary_scaling else None,
        "rope_parameters": {
            **scaling,
            "rope_theta": base,
            **({"partial_rotary_factor": fraction} if partial else {}),
        },
    }


def _refuse_sliding_window(data: dict[str, Any], layers: int) -> None:
    """Layer types decide where they are given; else the window begins at `max_window_layers`."""
    kinds = data.get("layer_types")
    if kinds is not None:
        if any(kind != "full_attention" for kind in kinds):
            refuse("layer_types", kinds, "full_attention in every layer")
        return
    windowed = (
        flag(data, "use_sliding_window", False) and data.get("sliding_window", 4096) is not None
    )
    if windowed and size(data, "max_window_layers", 28) < layers:
        refuse("use_sliding_window", True, "false, or max_window_layers of at least num_layers")
