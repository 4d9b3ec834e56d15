"""Fields of `config.json` that tell one layer from another: `layer_types` and the window."""

from collections.abc import Callable
from typing import Any

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.hf_fields import flag, refuse, size

WHOLE, WINDOWED = "full_attention", "sliding_attention"


def window_from_hf(
    data: dict[str, Any], layers: int, window: int | None, silent: Callable[[int], bool]
) -> dict[str, Any]:
    """`window` and `windowed` of `ModelConfig`: by `layer_types`, or as `silent` says by number.

    A window that no layer has is none.
    """
    kinds = data.get("layer_types")
    if kinds is None:
        windowed = tuple(silent(number) for number in range(layers))
    else:
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(kind not in (WHOLE, WINDOWED) for kind in kinds)
        ):
            refuse("layer_types", kinds, f"{WHOLE} or {WINDOWED} for each of {layers} layers")
        windowed = tuple(kind == WINDOWED for kind in kinds)
    if not any(windowed):
        return {"window": None, "windowed": ()}
    if window is None and kinds is None:
        refuse("sliding_window", window, "a whole number from 1")
    if window is None:
        refuse("layer_types", kinds, f"{WHOLE} in every layer where there is no sliding_window")
    return {"window": window, "windowed": windowed}


def window_size(data: dict[str, Any], default: int | None) -> int | None:
    """`sliding_window`, which null says there is none of."""
    there = data.get("sliding_window", default) is not None
    return size(data, "sliding_window", default) if there else None


def optional_window_from_hf(data: dict[str, Any], layers: int) -> dict[str, Any]:
    """Where layers from `max_window_layers` on have the window, if `use_sliding_window` is set."""
    window = window_size(data, 4096) if flag(data, "use_sliding_window", False) else None
    first = size(data, "max_window_layers", 28)
    return window_from_hf(data, layers, window, lambda number: bool(window) and number >= first)


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse; where no layer has a window, one of the whole context."""
    return {
        "layer_types": [WINDOWED if windowed else WHOLE for windowed in config.windowed_by_layer],
        "sliding_window": config.window or config.max_positions,
    }


def optional_window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse, with the flag."""
    return {**window_to_hf(config), "use_sliding_window": config.window is not None}
