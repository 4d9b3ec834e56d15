r"""Low-rank adapters as PEFT saves them: W + s B A, merged into weights, trained on, and written.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, in which every adapted
matrix has `base_model.model.NAME.lora_A.weight` [r, in] and `…lora_B.weight` [out, r]; s is
α / r, or α / √r with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732). `rank_pattern` and
`alpha_pattern` give single matrices an r and an α of their own.

Where a checkpoint fuses query, key and value in one matrix we keep three, each with an adapter of
its own. Fused they are one of rank 3r, whose B is zero outside its three blocks; read back it falls
into the three again. An adapter of rank r that PEFT made gives all three its A.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from jaxdyn.models.families import family_of
from jaxdyn.models.hf_layout import StoredTensor, stored_tensors
from jaxdyn.models.huggingface import local_directory
from jaxdyn.models.model import LanguageModel
from jaxdyn.models.tensors import open_tensors
from jaxdyn.storage.files import write_files
from jaxdyn.storage.reading import is_number, read_object, shown
from jaxdyn.types import JaxdynError, Params

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What transformers calls every family's classifier; a checkpoint may call it otherwise (embed_out).
_HEAD = "lm_head"
# What changes the product or other weights, and the value with which it does nothing.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
}


class Factors(NamedTuple):
    """An adapted matrix's: A [r, in], B [out, r], s."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def is_peft(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).is_file()


def peft_directory(name: str) -> Path:
    """The directory of an adapter, or of the hub's of that name; JaxdynError if it is none."""
    directory = local_directory(name)
    if not is_peft(directory):
        raise JaxdynError(f"model.adapter must be the directory of a PEFT adapter, got {name}")
    return directory


def add_peft(model: LanguageModel, params: Params, directory: Path) -> Params:
    """The parameters with the adapter's product in their weights, float32 or better.

    Raises:
      JaxdynError: if a file cannot be read, the adapter is of a kind that is not W + s B A, or it
        adapts a matrix that this model has not, or one of another shape.
    """
    stored = _places(model, stored_tensors(model))
    leaves = flatten_dict(params, keep_empty_nodes=True)
    moved = {}
    for name, factors in _read(model, stored, directory).items():
        tensor, layer = stored[name]
        change = factors.scale * (factors.b @ factors.a)
        parts = tensor.unpack(change if _out_first(tensor) else change.T)
        for path, part in zip(tensor.leaves, parts, strict=True):
            if path not in moved:
                moved[path] = np.array(leaves[path])
            moved[path][layer if tensor.stacked else ...] += part
    return unflatten_dict({**leaves, **moved})


def load_adapters(model: LanguageModel, params: Params, directory: Path) -> Params:
    """The parameters, which have adapters (`add_adapters`), with a directory's in their place.

    Raises:
      JaxdynError: as `add_peft`, and if it adapts other matrices than the parameters have adapters
        beside, or with another rank or scale.
    """
    leaves = flatten_dict(params, keep_empty_nodes=True)
    adapted = _adapted(model, leaves)
    everything = {s.names: s for s in (*stored_tensors(model), *adapted)}
    found = _read(model, _places(model, tuple(everything.values())), directory)
    wanted = {name for tensor in adapted for name in tensor.names}
    if differ := sorted(wanted ^ found.keys()):
        here, there = ("lora.targets", directory)[:: 1 if differ[0] in wanted else -1]
        raise JaxdynError(
            f"{here} adapts {differ[0]} and {there} does not: lora.targets, optim.backbone and "
            "optim.classifier must name what the adapter adapts, for it to be trained on"
        )
    moved = {}
    for tensor in adapted:
        parts = [
            _ours(model, tensor, leaves, name, found[name], directory) for name in tensor.names
        ]
        for number, path in enumerate(tensor.leaves):
            for place, name in enumerate(("lora_a", "lora_b")):
                layers = [part[number][place] for part in parts]
                moved[*path[:-1], name] = np.stack(layers) if tensor.stacked else layers[0]
    return unflatten_dict({**leaves, **moved})


def save_adapters(directory: Path, model: LanguageModel, params: Params, base: str) -> None:
    """Write the adapters of the parameters as PEFT reads them.

    Args:
      base: the model that they belong to, a directory or a hub name.

    Raises:
      JaxdynError: if there are none, or they cannot be written.
    """
    leaves = flatten_dict(params, keep_empty_nodes=True)
    adapted = _adapted(model, leaves)
    if not adapted:
        raise JaxdynError("the parameters have no adapters to write")
    tensors, targets, ranks = {}, [], {}
    for tensor in adapted:
        targets.append(_HEAD if _is_head(tensor) else _target(tensor.names[0]))
        for layer, name in enumerate(tensor.names):
            a, b = _theirs(tensor, leaves, layer)
            ranks[targets[-1]] = a.shape[0]
            module = _PREFIX + (_HEAD if _is_head(tensor) else name.removesuffix(".weight"))
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    rank = min(ranks.values())
    others = {name: r for name, r in ranks.items() if r != rank}
    alpha = lambda r: float(model.config.lora_scale * r)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": others,
        "alpha_pattern": {name: alpha(r) for name, r in others.items()},
        "target_modules": sorted(targets),
        "fan_in_fan_out": not family_of(model.config.architecture).transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    # The configuration at last: a directory without it holds no adapter.
    weights = save(tensors, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    write_files({directory / _WEIGHTS: weights, directory / CONFIG: text})


# -- between their factors and ours ---------------------------------------------------------------


def _adapted(model: LanguageModel, leaves: dict) -> list[StoredTensor]:
    """The tensors of a checkpoint beside whose leaves there are adapters."""
    stored = list(stored_tensors(model))
    if model.config.tied:
        name = family_of(model.config.architecture).modules["classifier"]
        shape = (model.config.vocab_size, model.config.width)
        head = ("classifier", "weight")
        stored.append(StoredTensor((f"{name}.weight",), (head,), (shape,), False, False, 1))
    return [
        s for s in stored if (*s.leaves[0][:-1], "lora_a") in leaves and s.leaves[0][-1] != "bias"
    ]


def _is_head(tensor: StoredTensor) -> bool:
    return tensor.leaves[0][0] == "classifier"


def _out_first(tensor: StoredTensor) -> bool:
    """Whether the checkpoint keeps it [out, in]."""
    return tensor.transposed or _is_head(tensor)


def _theirs(tensor: StoredTensor, leaves: dict, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A [R, in] and B [out, R] of one of a tensor's layers."""
    at = lambda path, name: np.asarray(leaves[*path[:-1], name])[layer if tensor.stacked else ...]
    pairs = [(at(path, "lora_a"), at(path, "lora_b")) for path in tensor.leaves]
    if _is_head(tensor):
        return pairs[0]
    rank, count = pairs[0][0].shape[1], len(pairs)
    blocks = []
    for number, (_, b) in enumerate(pairs):
        block = np.zeros((count * rank, b.shape[1]), b.dtype)
        block[number * rank : (number + 1) * rank] = b
        blocks.append(block)
    packed = tensor.pack(blocks)
    a = np.concatenate([a for a, _ in pairs], axis=1).T
    return a, packed if tensor.transposed else packed.T


def _ours(
    model: LanguageModel,
    tensor: StoredTensor,
    leaves: dict,
    name: str,
    factors: Factors,
    directory: Path,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`lora_a` and `lora_b` of each of a tensor's leaves."""
    path, head = tensor.leaves[0], _is_head(tensor)
    rank = leaves[*path[:-1], "lora_a"].shape[-2 if head else -1]
    a, b, scale = factors
    if not np.isclose(scale, model.config.lora_scale, rtol=1e-6, atol=0):
        raise JaxdynError(
            f"lora.alpha / lora.rank is {model.config.lora_scale:.6g}; {directory} has the scale "
            f"{scale:.6g} at {name}"
        )
    if head and a.shape[0] == rank:
        return [(a, b)]
    count, total = len(tensor.leaves), a.shape[0]
    shapes = tuple((total, shape[-1]) for shape in tensor.leaf_shapes)
    of_factor = dataclasses.replace(tensor, leaf_shapes=shapes)
    parts = of_factor.unpack(b if tensor.transposed else b.T) if not head else []
    if total == rank:
        return [(a.T, part) for part in parts]
    own = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    cut = [(a[where].T, part[where]) for where, part in zip(own, parts, strict=False)]
    kept = sum(np.count_nonzero(part) for _, part in cut)
    if total != count * rank or kept != np.count_nonzero(b):
        raise JaxdynError(f"lora.rank is {rank}; {directory} has rank {total} at {name}")
    return cut


def _target(name: str) -> str:
    """The module by which PEFT finds a tensor in every layer: what follows the layer's number."""
    module = name.removesuffix(".weight").split(".")
    (number,) = (i for i, word in enumerate(module) if word.isdigit())
    return ".".join(module[number + 1 :])


# -- reading --------------------------------------------------------------------------------------

Places = dict[str, tuple[StoredTensor, int]]
"""Each tensor's name, with the layer that it is of."""


def _places(model: LanguageModel, stored: tuple[StoredTensor, ...]) -> Places:
    return {name: (s, i) for s in stored for i, name in enumerate(s.names)}


def _read(model: LanguageModel, stored: Places, directory: Path) -> dict[str, Factors]:
    """The adapter's factors by the name of the tensor that they adapt, of the shapes it has."""
    config = read_object(directory / CONFIG)
    scale_of = _scales(config, directory / CONFIG)
    head = family_of(model.config.architecture).modules["classifier"]
    found = {}
    for written, (a, b) in _read_factors(directory / _WEIGHTS).items():
        name = f"{head}.weight" if written == f"{_HEAD}.weight" else written
        if name not in stored:
            raise JaxdynError(
                f"{directory} adapts {name}, which this {model.config.architecture} has not as a "
                "matrix of its own: it belongs to another base model"
            )
        tensor = stored[name][0]
        # PEFT goes by the layer too, whatever fan_in_fan_out says.
        wanted = tensor.shape if _out_first(tensor) else tensor.shape[::-1]
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != wanted:
            raise JaxdynError(
                f"{directory} adapts {name} as {[b.shape[0], a.shape[-1]]}; the model's is "
                f"{list(wanted)}: it belongs to another base model"
            )
        if a.shape[0] != b.shape[1]:
            raise JaxdynError(
                f"{directory}: A and B of {name} have ranks {a.shape[0]} and {b.shape[1]}"
            )
        found[name] = Factors(a, b, scale_of(written.removesuffix(".weight")))
    return found


def _scales(config: dict[str, Any], path: Path) -> Any:
    """s of a matrix, as a function of its module's name."""
    if config.get("peft_type") != "LORA":
        raise JaxdynError(f"{path}: peft_type must be LORA, got {shown(config.get('peft_type'))}")
    for name, nothing in _UNSUPPORTED.items():
        if config.get(name) not in (nothing, None) and config.get(name) != []:
            raise JaxdynError(f"{path}: {name} is not supported, got {shown(config[name])}")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict) or set("".join(pattern)) & set("^$*+?()[]{}|\\"):
            raise JaxdynError(f"{path}: {name} must name modules as they are, got {shown(pattern)}")

    def value(module: str, pattern: str, default: Any) -> Any:
        matches = (v for k, v in patterns[pattern].items() if f".{module}".endswith(f".{k}"))
        return next(matches, default)

    def scale(module: str) -> float:
        rank = value(module, "rank_pattern", config.get("r"))
        alpha = value(module, "alpha_pattern", config.get("lora_alpha"))
        if type(rank) is not int or not 1 <= rank <= 2**16 or not is_number(alpha):
            raise JaxdynError(
                f"{path} needs a rank r of 1 to {2**16} and a number lora_alpha, got "
                f"{shown(rank)} and {shown(alpha)}"
            )
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    return scale


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
