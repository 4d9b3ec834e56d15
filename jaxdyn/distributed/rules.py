"""Which mesh axes divide which axis of which parameter: the only place that says so.

A rule is a pattern for the end of a leaf's path and the mesh axes of its last dimensions; a
leading axis, of layers, is never divided, since every device computes every layer. Moments and
other trees of the parameters' shape follow the same rules, their paths ending alike.

The first of two dense layers is divided by what it writes and the second by what it reads (Shoeybi
et al. 2019, arXiv 1909.08053, section 3), so that a pair needs one sum over "tensor". Where
"tensor" leaves it the rows of the second, "fsdp" divides these: the compiler for TPUs scatters a
sum of gradients along a matrix's first axis, but one along its last it leaves whole on every
device. With both axes on the rows a decoding step would copy the matrix everywhere. W is divided by
vocabulary alone, over both axes: no device ever has all of W, and log-probs are sums over it.
Tables are divided by width, so that a device looks up its part of any row.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES = (
    (r"(query|key|value|up|gate)/kernel", P("fsdp", "tensor")),
    (r"(query|key|value|up|gate)/bias", P("tensor")),
    (r"(query|key|value|up|gate)/lora_a", P("fsdp", None)),
    (r"(query|key|value|up|gate)/lora_b", P(None, ("tensor", "fsdp"))),
    (r"(out|down)/kernel", P("tensor", "fsdp")),
    (r"(out|down)/lora_a", P(("tensor", "fsdp"), None)),
    (r"(out|down)/lora_b", P(None, "fsdp")),
    (r"(embed|position)/embedding|head_moment|head_share", P(None, ("tensor", "fsdp"))),
    (r"classifier/(.*/)?(weight|lora_b)", P(("tensor", "fsdp"), None)),
    (r"classifier/(.*/)?bias", P(("tensor", "fsdp"))),
)
"""All others, norms and biases of the width and a value head, are small and copied."""


BY_ROWS = (r"(out|down)/kernel", P("fsdp", None))
"""The second layer's rule where nothing is divided over "tensor"."""


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The axes that divide the leaf at `path`; see `fitting`."""
    rules = RULES if mesh.shape["tensor"] > 1 else (BY_ROWS, *RULES)
    for pattern, axes in rules:
        if re.search(rf"(^|/)({pattern})$", path) and len(shape) >= len(axes):
            return fitting(P(*[None] * (len(shape) - len(axes)), *axes), shape, mesh)
    return P()


def fitting(axes: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec without the mesh axes that do not divide their dimension, or divide it by one.

    It is as short as it can be, as XLA writes those of what it returns: JAX tells programs apart
    by specs.
    """
    kept: list[Any] = []
    for names, size in zip(axes, shape, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        names = tuple(name for name in names if mesh.shape[name] > 1)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        kept.append(names[0] if len(names) == 1 else names or None)
    while kept and kept[-1] is None:
        kept.pop()
    return P(*kept)


def path_name(path: tuple) -> str:
    """A key path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of a tree of arrays or of their shapes."""
    of_leaf = lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh))
    return jax.tree_util.tree_map_with_path(of_leaf, tree)
