"""Rotary positions in `config.json`.

Two spellings are in use: transformers up to 4 has `rope_theta`, or names of a family's own, and
`rope_scaling`; transformers 5 has `rope_parameters` with everything inside, one set for each of
`layer_types` where layers with a window have positions of their own. Both are read, and both are
written.
"""

import math
from typing import Any

from jaxdyn.models.config import ModelConfig, RotaryScaling
from jaxdyn.models.families.family import Family
from jaxdyn.models.hf_fields import number, one_of, refuse, size
from jaxdyn.models.hf_layers import WHOLE, WINDOWED

_PART = "partial_rotary_factor"


def rotary_from_hf(data: dict[str, Any], family: Family) -> dict[str, Any]:
    """The rotary fields of `ModelConfig` from either spelling.

    As in transformers, what stands inside `rope_scaling` or `rope_parameters` wins over the fields
    beside it, and among these a family's own name.
    """
    has_sets = lambda rope: (
        isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())
    )
    flat = data.get("rope_scaling") and not has_sets(data.get("rope_parameters"))
    where = "rope_scaling" if flat else "rope_parameters"
    rope = data.get(where) or {}
    nested = has_sets(rope)
    if not isinstance(rope, dict) or (nested and family.window_rotary is None):
        refuse(where, rope, "one set of parameters for all layers")
    data = {**data, where: rope}
    ours = {}
    if family.window_rotary is not None:
        beside, base = family.window_rotary
        base = number(data, beside, base)
        if nested:
            inside = f"{where}.{WINDOWED}"
            if not all(isinstance(x, dict | None) for x in rope.values()):
                refuse(where, rope, "a set of parameters for each kind of layer")
            data[where] = rope = {WINDOWED: {}, WHOLE: {}} | {k: v or {} for k, v in rope.items()}
            base = number(data, f"{inside}.rope_theta", base)
            one_of(data, _kind_in(rope[WINDOWED], inside), "default", ("default",))
            where, rope = f"{where}.{WHOLE}", rope[WHOLE]
        ours["window_rotary_base"] = base
    base, fraction = family.rotary_base, family.rotary_fraction
    partial = fraction < 1
    for name in ("rope_theta", family.rotary_names[0], f"{where}.rope_theta"):
        base = number(data, name, base)
    for name in (_PART, family.rotary_names[1], f"{where}.{_PART}"):
        fraction = number(data, name, fraction)
    if fraction > 1 or (fraction < 1 and not partial):
        refuse(_PART, fraction, "up to 1" if partial else "1")
    scaling = _scaling_from_hf(data, where, rope)
    return {"rotary_fraction": fraction, "rotary_base": base, "rotary_scaling": scaling, **ours}


def _kind_in(rope: dict[str, Any], where: str) -> str:
    """The name of the field that says which scaling it is."""
    return f"{where}.type" if "type" in rope and "rope_type" not in rope else f"{where}.rope_type"


def _scaling_from_hf(data: dict[str, Any], where: str, rope: Any) -> RotaryScaling | None:
    read = lambda name, *default: number(data, f"{where}.{name}", *default)
    kinds = ("default", "linear", "llama3", "yarn")
    kind = one_of(data, _kind_in(rope, where), "default", kinds)
    if kind == "default":
        return None
    factor = read("factor")
    if kind == "linear":
        return RotaryScaling("linear", factor)
    context = size(data, "max_position_embeddings")
    context = size(data, f"{where}.original_max_position_embeddings", context)
    if kind == "llama3":
        factors = read("low_freq_factor"), read("high_freq_factor")
        return RotaryScaling("llama3", factor, *factors, original_max_positions=context)
    for name, good in {"mscale": None, "mscale_all_dim": None, "truncate": True}.items():
        if rope.get(name) not in (None, good):
            refuse(f"{where}.{name}", rope[name], "none" if good is None else "true")
    return RotaryScaling(
        "yarn",
        factor,
        original_max_positions=context,
        beta_fast=read("beta_fast", 32),
        beta_slow=read("beta_slow", 1),
        amplitude=read("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _scaling_to_hf(scaling: RotaryScaling | None) -> dict[str, Any]:
    s = scaling
    if s is None:
        return {"rope_type": "default"}
    found: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        found["original_max_position_embeddings"] = s.original_max_positions
    if s.kind == "llama3":
        found |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        found |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        found["attention_factor"] = s.amplitude
    return found


def rotary_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Both spellings."""
    scaling = _scaling_to_hf(config.rotary_scaling)
    base, fraction = config.rotary_base, config.rotary_fraction
    beside, inside = {family.rotary_names[0]: base}, {**scaling, "rope_theta": base}
    if family.rotary_fraction < 1:
        beside[family.rotary_names[1]] = inside[_PART] = fraction
    if family.window_rotary is not None:
        near = config.window_rotary_base or base
        beside = {family.window_rotary[0]: near, **beside}
        inside = {WHOLE: inside, WINDOWED: {"rope_type": "default", "rope_theta": near}}
    scaling_beside = scaling if config.rotary_scaling else None
    return {**beside, "rope_scaling": scaling_beside, "rope_parameters": inside}
