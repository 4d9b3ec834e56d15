r"""Low-rank adapters as PEFT saves them: added to a model's weights, W + s B A.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, in which every adapted
matrix has `base_model.model.NAME.lora_A.weight` [r, in] and `…lora_B.weight` [out, r]; s is
α / r, or α / √r with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732).
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdyn.models.hf_layout import stored_tensors
from jaxdyn.models.model import LanguageModel
from jaxdyn.models.tensors import open_tensors
from jaxdyn.reading import is_number, read_object, shown
from jaxdyn.types import JaxdynError, Params

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the product or other weights, and the value with which it does nothing.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
}


def is_peft(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).is_file()


def add_peft(model: LanguageModel, params: Params, directory: Path) -> Params:
    """The parameters with the adapter's product in their weights, float32 or better.

    Raises:
      JaxdynError: if a file cannot be read, the adapter is of a kind that is not W + s B A, or it
        adapts a matrix that this model has not, or one of another shape.
    """
    scale, turned = _read_config(directory / CONFIG)
    stored = {name: (s, i) for s in stored_tensors(model) for i, name in enumerate(s.names)}
    leaves = flatten_dict(params, keep_empty_nodes=True)
    moved = {}
    for name, (a, b) in _read_factors(directory / _WEIGHTS).items():
        if name not in stored:
            raise JaxdynError(
                f"{directory} adapts {name}, which this {model.config.architecture} has not as a "
                "matrix of its own: it belongs to another base model"
            )
        tensor, layer = stored[name]
        wanted = tensor.shape[::-1] if turned else tensor.shape
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != wanted or len(a) != len(b.T):
            raise JaxdynError(
                f"{directory} adapts {name} as {[b.shape[0], a.shape[-1]]}; the model's is "
                f"{list(wanted)}: it belongs to another base model"
            )
        change = scale * (b @ a)
        parts = tensor.unpack(change.T if turned else change)
        for path, part in zip(tensor.leaves, parts, strict=True):
            if path not in moved:
                moved[path] = np.array(leaves[path])
            moved[path][layer if tensor.stacked else ...] += part
    return unflatten_dict({**leaves, **moved})


def _read_config(path: Path) -> tuple[float, bool]:
    """s, and whether the adapted matrices are stored [in, out]."""
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise JaxdynError(f"{path}: peft_type must be LORA, got {shown(config.get('peft_type'))}")
    for name, nothing in _UNSUPPORTED.items():
        if config.get(name) not in (nothing, None) and config.get(name) != []:
            raise JaxdynError(f"{path}: {name} is not supported, got {shown(config[name])}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 2**16 or not is_number(alpha):
        raise JaxdynError(
            f"{path} needs a rank r of 1 to {2**16} and a number lora_alpha, got {shown(rank)} and "
            f"{shown(alpha)}"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scale, bool(config.get("fan_in_fan_out"))


def _read_factors(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name of the adapted tensor: (A, B)}, float32."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for name, tensor in open_tensors(path, stack).items():
            base, _, factor = name.removeprefix(_PREFIX).partition(".lora_")
            factor = factor.removeprefix("embedding_")
            found.setdefault(base, {})[factor[:1]] = tensor.read().astype(np.float32)
    for name, factors in found.items():
        if set(factors) != {"A", "B"}:
            raise JaxdynError(f"{path} has not both factors, lora_A and lora_B, of {name}")
    if not found:
        raise JaxdynError(f"{path} holds no adapter")
    return {f"{name}.weight": (x["A"], x["B"]) for name, x in found.items()}
