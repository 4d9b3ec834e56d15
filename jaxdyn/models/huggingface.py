"""Checkpoints in the Hugging Face layout, in and out: JSON and safetensors only.

A directory holds `config.json` and either `model.safetensors` or the shards that
`model.safetensors.index.json` names. A save writes everything under other names, and `config.json`
last, so a save that was cut short has no `config.json` and loads nowhere.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.families import family_of
from jaxdyn.models.hf_config import config_from_hf, config_to_hf, token_ids
from jaxdyn.models.hf_head import modules_of
from jaxdyn.models.hf_layout import StoredTensor, stored_tensors
from jaxdyn.models.model import LanguageModel
from jaxdyn.models.placing import Where, put, put_layers
from jaxdyn.models.tensors import Tensor, open_tensors
from jaxdyn.storage.files import room
from jaxdyn.storage.paths import require_name
from jaxdyn.storage.reading import read_object, require_room
from jaxdyn.types import JaxdynError, Params

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"
# Constants that older versions of transformers kept in checkpoints beside the weights.
_CONSTANTS = re.compile(r"(attention|attn)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def local_directory(name_or_path: str | os.PathLike) -> Path:
    """A directory as it is; else the hub's model of that name, fetched: JSON, safetensors and the
    chat template, nothing else.

    Raises JaxdynError where it is neither, or no name at all.
    """
    if not os.fspath(name_or_path):
        raise JaxdynError("no model is named: give a Hugging Face directory or a hub name, got ''")
    require_name(os.fspath(name_or_path), "the name of a model")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise JaxdynError(f"{path} is a file; the directory of a checkpoint is wanted")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "chat_template.jinja"]
    try:
        fetched = snapshot_download(str(name_or_path), allow_patterns=wanted)
    except Exception as error:  # whatever its network stack raises, which differs by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise JaxdynError(
            f"{name_or_path} is neither a directory nor a model the hub would give ({reason})"
        ) from error
    return Path(fetched)


# -- loading ------------------------------------------------------------------------------------


def load_pretrained(
    name_or_path: str | os.PathLike,
    *,
    untie: bool = False,
    dtype: Any = jnp.float32,
    where: Where | None = None,
) -> tuple[LanguageModel, Params]:
    """A model computing in `dtype`, with float32 parameters, from a directory or a hub name.

    `untie` gives tied embeddings a classifier of their own. Parameters go to the devices that
    `where` says, else to JAX's default one, as they are read: beside the result a few copies of the
    largest tensor are held, and of small leaves (`STREAMED`) all layers. Raises JaxdynError for a
    config we do not support and for weights that are missing, cut short, of another shape or not
    floats.
    """
    directory = local_directory(name_or_path)
    config = pretrained_config(directory)
    if config.head is not None:
        raise JaxdynError(
            f"{directory} scores sequences (config.json: architectures), a language model is wanted"
        )
    model, params = _load(directory, config, dtype, where)
    return model.untie(params) if untie and model.config.tied else (model, params)


def load_reward_model(
    name_or_path: str | os.PathLike, *, dtype: Any = jnp.float32, where: Where | None = None
) -> tuple[LanguageModel, Params]:
    """A model with a head that gives a sequence one score, as `load_pretrained` loads others.

    Raises JaxdynError as that does, for a checkpoint without such a head, and for more labels.
    """
    directory = local_directory(name_or_path)
    config = pretrained_config(directory)
    if config.head is None:
        raise JaxdynError(
            f"{directory} has no head that scores sequences: config.json's architectures should "
            "name a class for sequence classification, or ArmoRM's"
        )
    if config.head.scores != 1:
        raise JaxdynError(
            f"{directory}: num_labels is {config.head.scores}, and a reward is one number: wanted 1"
        )
    return _load(directory, config, dtype, where)


def _load(
    directory: Path, config: ModelConfig, dtype: Any, where: Where | None
) -> tuple[LanguageModel, Params]:
    model = LanguageModel(config, dtype)
    with contextlib.ExitStack() as stack:
        return model, _read_weights(model, _open_tensors(directory, stack), where)


def pretrained_config(directory: Path) -> ModelConfig:
    """What a directory's config.json says; JaxdynError for a model we do not support."""
    return config_from_hf(read_object(directory / "config.json"))


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name; its files stay open as long as `stack`."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        tensors |= open_tensors(path, stack)
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise JaxdynError(f"{directory} has neither {_WEIGHTS} nor {_INDEX}")
    index = read_object(directory / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise JaxdynError(f"{directory / _INDEX} has no weight_map from tensors to files")
    files = sorted({str(name) for name in index.values()})
    for name in files:
        require_name(name, f"{directory / _INDEX}: a file's name")
        if Path(name).name != name:
            raise JaxdynError(f"{directory / _INDEX} names {name!r}, not a file beside it")
        if not (directory / name).is_file():
            raise JaxdynError(f"{directory / name} is missing; {_INDEX} names it")
    return [directory / name for name in files]


def _read_weights(model: LanguageModel, tensors: dict[str, Tensor], where: Where | None) -> Params:
    _require_plausible(model.config, tensors)
    modules = modules_of(model.config, family_of(model.config.architecture))
    prefix, head = modules["backbone/embed"].split(".")[0] + ".", modules["classifier"] + "."
    if not any(name.startswith(prefix) for name in tensors):  # a checkpoint of the bare body
        tensors = {n if n.startswith(head) else prefix + n: t for n, t in tensors.items()}
    stored = stored_tensors(model)
    _check(model, stored, tensors)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for s in stored:
        layers = (s.unpack(tensors[name].read()) for name in s.names)
        places = [where and functools.partial(where, "/".join(path)) for path in s.leaves]
        arrays = put_layers(layers, s, places) if s.stacked else map(put, next(layers), places)
        leaves |= dict(zip(s.leaves, arrays, strict=True))
    return {"classifier": {}, **unflatten_dict(leaves)}


def _require_plausible(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """That the sizes are of a file like this, before shapes and names are made of them."""
    if config.num_layers > len(tensors):
        raise JaxdynError(
            f"config.json promises {config.num_layers} layers, and the checkpoint holds "
            f"{len(tensors)} tensors"
        )
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    heads = config.num_heads * config.head_dim
    sizes = {"width": config.width, "vocab_size": config.vocab_size, "mlp_width": config.mlp_width}
    for name, size in {**sizes, "num_heads * head_dim": heads}.items():
        if size > numbers:
            raise JaxdynError(
                f"config.json promises a {name} of {size}, and the checkpoint holds {numbers} "
                "numbers in all"
            )


def _check(
    model: LanguageModel, stored: Sequence[StoredTensor], tensors: dict[str, Tensor]
) -> None:
    """That the headers promise exactly the tensors this model has."""
    wanted = {name: s.shape for s in stored for name in s.names}
    files = ", ".join(sorted({str(tensor.path) for tensor in tensors.values()}))
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise JaxdynError(
            f"{files} lacks the tensor {missing[0]}, shape {list(wanted[missing[0]])}"
            + _and_more(missing)
        )
    head = family_of(model.config.architecture).modules["classifier"]
    known = {*wanted, f"{head}.weight"} if model.config.tied else wanted
    unexpected = [n for n in tensors if n not in known and not _CONSTANTS.search(n)]
    if unexpected:
        tensor = tensors[unexpected[0]]
        raise JaxdynError(
            f"{tensor.path} holds the tensor {unexpected[0]}, shape {list(tensor.shape)}, which a "
            f"{model.config.architecture} of this config.json does not have{_and_more(unexpected)}"
        )
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise JaxdynError(
                f"{tensor.path}: the tensor {name} has shape {list(tensor.shape)}, "
                f"wanted {list(shape)}"
            )
        tensor.require_floats()
    require_room(tensor.path, 4 * sum(math.prod(shape) for shape in wanted.values()))


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if names[1:] else ""


# -- saving -------------------------------------------------------------------------------------


def save_pretrained(
    directory: str | os.PathLike,
    model: LanguageModel,
    params: Params,
    *,
    bos_token_id: int | None = None,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write float32 weights and configs that transformers and `load_pretrained` load exactly.

    Weights beyond `max_shard_bytes` are split into shards; one shard is held at a time. Other files
    in the directory are left alone. Raises JaxdynError if the family cannot express the
    configuration, if the parameters are another model's, or if writing fails.
    """
    directory = Path(directory)
    config = config_to_hf(model.config, bos_token_id=bos_token_id, stop_ids=stop_ids)
    stored = stored_tensors(model)
    leaves = flatten_dict(params)
    _check_params(stored, leaves)
    sizes = {n: 4 * int(np.prod(s.shape)) for s in stored for n in s.names}
    shards = _shards(sizes, max_shard_bytes)
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    configs = {
        **({_INDEX: index} if len(shards) > 1 else {}),
        "generation_config.json": token_ids(bos_token_id, stop_ids),
        "config.json": config,
    }
    partial = {name: directory / (name + _PARTIAL) for name in (*shards, *configs)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(stored, leaves)
        for file, names in shards.items():
            shard = dict(itertools.islice(tensors, len(names)))
            save_file(shard, partial[file], metadata={"format": "pt"})
        for file, content in configs.items():
            partial[file].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # From here until the last rename the directory is no checkpoint at all.
        (directory / "config.json").unlink(missing_ok=True)
        for stale in (*directory.glob("model*.safetensors"), directory / _INDEX):
            stale.unlink(missing_ok=True)
        for file, path in partial.items():
            path.replace(directory / file)
    except (OSError, SafetensorError) as error:
        said = str(error)
        if "No space left" in said:
            said = f"No space left on device{room(directory, sum(sizes.values()))}"
        raise JaxdynError(f"cannot write the checkpoint {directory}: {said}") from error
    finally:
        with contextlib.suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)


def _check_params(stored: Sequence[StoredTensor], leaves: dict) -> None:
    shapes = {
        path: ((len(s.names), *shape) if s.stacked else shape)
        for s in stored
        for path, shape in zip(s.leaves, s.leaf_shapes, strict=True)
    }
    got = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    for path in sorted(shapes.keys() | got.keys()):
        if shapes.get(path) != got.get(path):
            raise JaxdynError(
                f"the parameter {'/'.join(path)} has shape {got.get(path)}, the model wants "
                f"{shapes.get(path)}"
            )


def _shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File names and the tensors each holds, in order; a new file where one would overflow."""
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {_WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _tensors(stored: Sequence[StoredTensor], leaves: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors in order, packed one at a time."""
    for s in stored:
        arrays = [np.asarray(leaves[path], np.float32) for path in s.leaves]
        for layer, name in enumerate(s.names):
            yield name, s.pack([a[layer] if s.stacked else a for a in arrays])
