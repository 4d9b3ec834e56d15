"""Where each parameter lives in a Hugging Face checkpoint: name, orientation, fused matrices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdyn.models.families import family_of
from jaxdyn.models.hf_head import NAMED, modules_of
from jaxdyn.models.model import LanguageModel

Path = tuple[str, ...]
"""Keys into the parameter tree, such as `("backbone", "norm", "scale")`."""

_FUSED_ORDER = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The tensors of a checkpoint, one a layer, that hold one of our leaves or three fused ones.

    Ours, a layer: `[..., width]` of each leaf. Fused, their last axes interleave as
    `[blocks, 3, width / blocks]`: blocks are the heads or one, by family. `transposed` then says
    that the checkpoint keeps `[out, in]` where we keep `[in, out]`.
    """

    names: tuple[str, ...]
    leaves: tuple[Path, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]
    stacked: bool
    transposed: bool
    blocks: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        *rest, width = self.leaf_shapes[0]
        shape = (*rest, width * len(self.leaves))
        return shape[::-1] if self.transposed else shape

    def unpack(self, tensor: np.ndarray) -> list[np.ndarray]:
        """One layer's leaves from its tensor in the checkpoint."""
        tensor = tensor.T if self.transposed else tensor
        if len(self.leaves) == 1:
            return [tensor]
        blocks = tensor.reshape(*tensor.shape[:-1], self.blocks, len(self.leaves), -1)
        return [blocks[..., i, :].reshape(shape) for i, shape in enumerate(self.leaf_shapes)]

    def pack(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `unpack`."""
        tensor = leaves[0]
        if len(leaves) > 1:
            *rest, _ = tensor.shape
            blocks = [leaf.reshape(*rest, self.blocks, -1) for leaf in leaves]
            tensor = np.stack(blocks, axis=-2).reshape(*rest, -1)
        return np.ascontiguousarray(tensor.T if self.transposed else tensor)


@functools.lru_cache(maxsize=8)
def stored_tensors(model: LanguageModel) -> tuple[StoredTensor, ...]:
    """Every tensor that a checkpoint of this model holds."""
    config = model.config
    family = family_of(config.architecture)
    modules = modules_of(config, family)
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    by_name: dict[str, list[Path]] = {}
    for path in leaves:
        by_name.setdefault(_name(path, modules), []).append(path)
    stored = []
    for name, paths in by_name.items():
        if len(paths) > 1:
            paths.sort(key=lambda path: _FUSED_ORDER.index(path[-2]))
        stacked = "{}" in name
        numbers = range(config.num_layers) if stacked else [0]
        stored.append(
            StoredTensor(
                names=tuple(name.format(number) for number in numbers),
                leaves=tuple(paths),
                leaf_shapes=tuple(leaves[path].shape[stacked:] for path in paths),
                stacked=stacked,
                transposed=paths[0][-1] == "kernel" and family.transposed,
                blocks=config.num_heads if family.fused_by_head else 1,
            )
        )
    return tuple(stored)


def _name(path: Path, modules: dict[str, str]) -> str:
    """A leaf's tensor in a checkpoint, with {} for the layer."""
    if (whole := "/".join(path)) in NAMED:
        return NAMED[whole]
    return f"{modules['/'.join(path[:-1])]}.{'bias' if path[-1] == 'bias' else 'weight'}"
