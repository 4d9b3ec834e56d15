"""Where arrays lie on the mesh, and how they get there and back."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdyn.distributed.mesh import ROWS, make_mesh
from jaxdyn.distributed.rules import fitting, shardings, spec_of
from jaxdyn.hosts import is_local
from jaxdyn.sections import MeshConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places trees of arrays on a mesh.

    Every process calls these with the same values, of which each takes what its devices hold: a
    host feeds its own rows, and nothing is sent between hosts.
    """

    mesh: Mesh

    def place(self, tree: Any) -> Any:
        """Parameters, moments, or a state of them: divided by the rules."""
        return jax.tree.map(put, tree, shardings(self.mesh, tree))

    def where(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the rules put the leaf at a path."""
        return NamedSharding(self.mesh, spec_of(path, shape, self.mesh))

    def shapes(self, tree: Any) -> Any:
        """The shapes of such a tree, with the shardings that `place` would give its leaves."""
        of_leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(of_leaf, tree, shardings(self.mesh, tree))

    def rows(self, tree: Any) -> Any:
        """A batch: leading axes divided over "data" and "fsdp"; copied where that cannot be."""
        spec = lambda x: fitting(P(ROWS), np.shape(x), self.mesh) if np.ndim(x) else P()
        return jax.tree.map(lambda x: put(x, NamedSharding(self.mesh, spec(x))), tree)

    def everywhere(self, tree: Any) -> Any:
        """A copy on every device."""
        return jax.tree.map(lambda x: put(x, NamedSharding(self.mesh, P())), tree)


def one_device() -> Layout:
    """The layout of a single device, the first of this process."""
    return Layout(make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1]))


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """The array on the devices of a sharding, of which other processes may hold some."""
    if sharding.is_fully_addressable or not is_local(x):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
