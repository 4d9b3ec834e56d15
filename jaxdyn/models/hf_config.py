"""`config.json` to and from `ModelConfig`, by the one table of a family for both directions.

Two spellings of rotary positions are in use: transformers up to 4 has `rope_theta`, or names of a
family's own, and `rope_scaling`; transformers 5 has `rope_parameters` with everything inside. Both
are read, and both are written.
"""

from collections.abc import Sequence
from typing import Any

from jaxdyn.models.config import ModelConfig, RotaryScaling
from jaxdyn.models.families import FAMILIES, family_of
from jaxdyn.models.families.family import Family
from jaxdyn.models.hf_fields import REQUIRED, number, one_of, refuse, size
from jaxdyn.types import JaxdynError

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
    family = FAMILIES[one_of(data, "model_type", REQUIRED, FAMILIES)]
    for name, good in _FIXED.items():
        if data.get(name) not in (None, good):
            refuse(name, data[name], "none" if good is None else str(good).lower())
    ours = {f.ours: f.read(data, f.theirs, f.default) for f in family.fields}
    if family.rotary_fraction:
        ours |= _rotary_from_hf(data, family)
    family.check(data, ours)
    return family.config(**ours)


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The contents of a `config.json` with which transformers builds the same function.

    Raises JaxdynError for a configuration that the family's `config.json` cannot express.
    """
    family = family_of(config.architecture)
    data = {
        "model_type": config.architecture,
        "architectures": [family.causal_lm],
        "dtype": "float32",
        **token_ids(bos_token_id, stop_ids),
        **{f.theirs: getattr(config, f.ours) for f in family.fields},
        **(_rotary_to_hf(config, family) if family.rotary_fraction else {}),
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


def _rotary_from_hf(data: dict[str, Any], family: Family) -> dict[str, Any]:
    """`rotary_fraction`, `rotary_base` and `rotary_scaling` from either spelling.

    As in transformers, what stands inside `rope_scaling` or `rope_parameters` wins over the fields
    beside it, and among these a family's own name.
    """
    where = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(where) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(where, rope, "one set of parameters for all layers")
    data = {**data, where: rope}
    base, fraction = 10000.0, family.rotary_fraction
    partial = fraction < 1
    for name in ("rope_theta", family.rotary_names[0], f"{where}.rope_theta"):
        base = number(data, name, base)
    part = "partial_rotary_factor"
    for name in (part, family.rotary_names[1], f"{where}.{part}"):
        fraction = number(data, name, fraction)
    if fraction > 1 or (fraction < 1 and not partial):
        refuse(part, fraction, "up to 1" if partial else "1")
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


def _rotary_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rotary_scaling is not None:
        s = config.rotary_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling["low_freq_factor"] = s.low_freq_factor
            scaling["high_freq_factor"] = s.high_freq_factor
            scaling["original_max_position_embeddings"] = s.original_max_positions
    base, fraction = config.rotary_base, config.rotary_fraction
    beside, inside = {family.rotary_names[0]: base}, {**scaling, "rope_theta": base}
    if family.rotary_fraction < 1:
        beside[family.rotary_names[1]] = inside["partial_rotary_factor"] = fraction
    scaling_beside = scaling if config.rotary_scaling else None
    return {**beside, "rope_scaling": scaling_beside, "rope_parameters": inside}
