"""jaxdyn: what one reinforcement-learning update does to a language model, and why.

A language model here is two pure functions over two subtrees of one parameter tree:

    features : params["backbone"],   tokens   -> phi          [B, T, D]
    logits   : params["classifier"], features -> f = W phi    [B, T, V]

The empirical NTK splits exactly at that cut into a representation and a gradient component
(A. Tomihari, arXiv 2601.04670). Subpackages are imported on first use.
"""

import ctypes
import importlib
import os
import sys
from glob import glob
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

COMPONENTS = ("representation", "gradient", "cross")
"""The components by which kernels and updates are split, as `types.Components` has them."""

_ROOMS = frozenset(
    "config data dynamics kernels models optim report rewards rl rollout train types".split()  # noqa: SIM905
)

NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What libtpu wants to know of its machine; one that is told nothing complains at length."""

# JAX asks libtpu for a TPU wherever it is installed. Where there is one it has a device file (or is
# far away, and forced); elsewhere this is said, and nothing found, as quietly as without libtpu.
if not (glob("/dev/accel*") or glob("/dev/vfio/*") or "JAX_FORCE_TPU_INIT" in os.environ):
    for _name, _value in NO_TPU.items():
        os.environ.setdefault(_name, _value)

HIDDEN: list[str] = []
"""Modules of JAX's CUDA plugin that JAX is not shown; `jaxdyn plan` takes them out again."""


def _hide_cuda() -> None:
    """Where NVIDIA's driver is not, JAX finds no CUDA plugin, which would say so at length."""
    plugins = [name for name in ("cuda12", "cuda13") if find_spec(f"jax_{name}_plugin")]
    if "jax" in sys.modules or not plugins:
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        for name in plugins:
            idle = ModuleType(f"jax_plugins.xla_{name}")
            idle.initialize = lambda: None  # type: ignore[attr-defined]
            sys.modules |= {f"jax_{name}_plugin": None, idle.__name__: idle}  # type: ignore[dict-item]
            HIDDEN.extend([f"jax_{name}_plugin", idle.__name__])


_hide_cuda()


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"jaxdyn.{name}")
    raise AttributeError(f"module 'jaxdyn' has no attribute {name!r}")


def __dir__():
    return [*_ROOMS, "COMPONENTS", "__version__"]
