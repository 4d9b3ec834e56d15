"""Finished tiles on disk, so that long work goes on where it was killed."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.hosts import fetch
from jaxdyn.storage.files import write_file
from jaxdyn.storage.reading import read_arrays, read_bytes
from jaxdyn.types import JaxdynError


class Store:
    """A directory of one kernel's finished tiles, each an .npz of arrays by name.

    Args:
      directory: made where it is missing.
      content: strings and numbers that say which kernel and which grid of tiles these are.

    Raises:
      JaxdynError: if the directory is a file, or holds the tiles of another kernel.
    """

    def __init__(self, directory: Path, content: list):
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise JaxdynError(f"blocks must be a directory, and {self.directory} is a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        manifest = self.directory / "kernel.json"
        said = json.dumps(content)
        if not manifest.exists():
            write_file(manifest, said)
        elif read_bytes(manifest) != said.encode():
            raise JaxdynError(
                f"{self.directory} holds finished tiles of another kernel (other parameters, "
                "sites, options or memory budget): name another directory, or delete this one"
            )

    def load(self, row: int, column: int) -> dict[str, np.ndarray] | None:
        """A finished tile, or None: one that cannot be read is made again."""
        try:
            return read_arrays(self._path(row, column)) or None
        except (FileNotFoundError, JaxdynError):
            return None

    def save(self, row: int, column: int, tile: dict[str, np.ndarray]) -> None:
        """Keep a finished tile."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **tile)
        write_file(self._path(row, column), buffer.getvalue())

    def _path(self, row: int, column: int) -> Path:
        return self.directory / f"tile_{row:05d}_{column:05d}.npz"


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    uneven = wide
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(wide.dtype, x.shape, axis)
        uneven *= jnp.cos((axis + 1) * place)
    return jnp.stack([jnp.sum(wide), jnp.sum(uneven)])


def digest(tree: Any) -> str:
    """A short name for a tree's content: host arrays by their bytes, device arrays by two sums."""
    found = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for x in jax.tree.leaves(tree):
        found.update(f"{x.shape} {x.dtype}".encode())
        found.update(fetch(_sums(x)).tobytes() if isinstance(x, jax.Array) else x.tobytes())
    return found.hexdigest()[:16]
