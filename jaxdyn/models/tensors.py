"""The tensors of a safetensors file: known by its header, which is checked, until they are read."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxdyn.storage.paths import one_line
from jaxdyn.types import JaxdynError

_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor:
    """One tensor of an open file."""

    def __init__(self, path: Path, handle: Any, name: str):
        self.path, self._handle, self._name = path, handle, name
        header = handle.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), header.get_dtype()

    def require_floats(self) -> None:
        """JaxdynError if its numbers are of another type."""
        if self.dtype not in _FLOATS:
            raise JaxdynError(
                f"{self.path}: the tensor {self._name} has type {self.dtype}, "
                f"wanted one of {', '.join(_FLOATS)}"
            )

    def read(self) -> np.ndarray:
        """Its numbers, in float32 or float64.

        Raises:
          JaxdynError: if it is not of floats, or one of them is not finite.
        """
        self.require_floats()
        try:
            numbers = self._handle.get_tensor(self._name)
        except Exception as error:  # the file may have changed meanwhile
            what = f"{self.path}: cannot read {self._name}"
            raise JaxdynError(f"{what}: {one_line(error)}") from error
        if numbers.dtype.itemsize < 4:
            numbers = numbers.astype(np.float32)
        if not np.isfinite(numbers).all():
            bad = int(numbers.size - np.isfinite(numbers).sum())
            raise JaxdynError(
                f"{self.path}: the tensor {self._name} is damaged: {bad} of its {numbers.size} "
                "numbers are not finite"
            )
        return numbers


def open_tensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """A file's tensors by name; it stays open as long as `stack`.

    Raises:
      JaxdynError: for a file that is cut short, or whose header promises what it does not hold.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise ValueError(f"its header should take {header} bytes, and it has {size}")
        handle = stack.enter_context(safe_open(path, framework="numpy"))
        return {name: Tensor(path, handle, name) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises many kinds
        reason = one_line(error, kind=False)
        raise JaxdynError(f"{path} is not a whole safetensors file: {reason}") from error
