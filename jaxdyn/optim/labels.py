"""Which leaves an update moves: full training, low-rank adapters, or nothing, for each part.

A label is a function of the leaf's path alone. An update differentiates and optimizes the moving
leaves and nothing else, so what is frozen costs no gradient and no moments.
"""

from collections.abc import Callable
from typing import Literal

from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdyn.types import Params

Mode = Literal["full", "lora", "frozen"]
ADAPTER_LEAVES = ("lora_a", "lora_b")


def moves(mode: Mode, path: tuple[str, ...]) -> bool:
    """Whether a part under `mode` moves the leaf at `path`.

    full     every leaf      lora     its adapters alone      frozen     none
    """
    if mode == "lora":
        return path[-1] in ADAPTER_LEAVES
    return mode == "full"


def split(params: Params, chosen: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """The leaves whose path is `chosen`, and the others, as two trees.

    An empty branch (a tied model's classifier) counts as a leaf.
    """
    leaves = flatten_dict(params, keep_empty_nodes=True)
    moving = {path: leaf for path, leaf in leaves.items() if chosen(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in moving}
    return unflatten_dict(moving), unflatten_dict(frozen)


def merge(*trees: Params) -> Params:
    """The union of trees that share no leaf: `split`'s inverse."""
    leaves = [flatten_dict(tree, keep_empty_nodes=True) for tree in trees]
    return unflatten_dict({path: leaf for tree in leaves for path, leaf in tree.items()})
