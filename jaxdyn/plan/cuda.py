"""A GPU's compiler without the GPU: JAX's CUDA plugin, told by a data sheet what it compiles for.

The plugin is found without NVIDIA's driver or libraries, of which it needs none to compile. What a
GPU would have told is not known: which of several kernels is fastest there, so that matrix products
are Triton's or cuBLAS's default, and what workspace cuDNN's kernels take.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jaxlib
from jax.experimental import topologies

from jaxdyn import HIDDEN
from jaxdyn.types import JaxdynError

UNKNOWN = (
    "not known without a GPU: cuDNN's workspace, and the kernels that autotuning would choose "
    "(products here are Triton's, or cuBLAS's by default)"
)
CUDNN = 9, 10, 0
"""The version of cuDNN that is planned for: its attention, in JAX, asks the library for it."""


class Processors(NamedTuple):
    """What the compiler wants to know beside memory and bandwidth.

    Attributes:
      name: JAX's of the device.
      capability: of CUDA.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      shared: bytes of shared memory of each; a block may have 1 KiB less.
      cache: bytes of L2.
      clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared: int
    cache: int
    clock: float


# NVIDIA's white papers of the A100, H100 and Blackwell, and the CUDA programming guide's table of
# technical specifications per compute capability.
PROCESSORS = {
    "a100": Processors("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 40 * 2**20, 1.41),
    "h100": Processors("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "h200": Processors("NVIDIA H200", (9, 0), 132, 128, 233472, 50 * 2**20, 1.98),
    "b200": Processors("NVIDIA B200", (10, 0), 148, 128, 233472, 126 * 2**20, 1.965),
}


def cuda_devices(chip: str, hosts: int, each: int, hbm: int, bandwidth: float) -> list[jax.Device]:
    """Devices to compile for: `each` GPUs of `hosts` hosts, of so many bytes and bytes a second.

    Raises:
      JaxdynError: if the plugin is not installed, or not of jaxlib's version.
    """
    plugin = require_plugin(chip)
    options = {
        "topology": f"1x{hosts}x{each}",
        "target_config": target(PROCESSORS[chip], hbm, bandwidth),
    }
    with _silence():
        while HIDDEN:  # where there is no driver
            del sys.modules[HIDDEN.pop()]
        module = importlib.import_module(f"jax_plugins.xla_{plugin}")
        try:
            found = topologies.get_topology_desc(platform="cuda", **options)
        except NotImplementedError:  # JAX has looked for plugins before, and was not shown this one
            module.initialize()
            found = topologies.get_topology_desc(platform="cuda", **options)
    from jax._src.cudnn import fused_attention_stablehlo as attention

    major, minor, patch = CUDNN
    attention.check_cudnn_version = lambda: 10_000 * major + 100 * minor + patch
    return list(found.devices)


def require_plugin(chip: str) -> str:
    """ "cuda12" or "cuda13": the plugin that is there, of jaxlib's version."""
    wanted = jaxlib.__version__
    install = "pip install 'jaxdyn[plan-gpu]'"
    for plugin in ("cuda13", "cuda12"):
        packages = f"jax-{plugin}-plugin", f"jax-{plugin}-pjrt"
        try:
            versions = [importlib.metadata.version(package) for package in packages]
        except importlib.metadata.PackageNotFoundError:
            continue
        for package, version in zip(packages, versions, strict=True):
            if version != wanted:
                raise JaxdynError(
                    f"compiling for {chip} needs {package} {wanted}, as jaxlib is, and {version} "
                    f"is installed: pip install {package}=={wanted}"
                )
        return plugin
    raise JaxdynError(f"compiling for {chip} needs JAX's CUDA plugin: {install}")


def target(processors: Processors, hbm: int, bandwidth: float) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    dnn, capability = CUDNN, processors.capability
    return f"""
platform_name: "CUDA"
device_description_str: "{processors.name}"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
gpu_device_info {{
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  core_count: {processors.cores}
  fpus_per_core: {processors.lanes}
  clock_rate_ghz: {processors.clock}
  shared_memory_per_core: {processors.shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {processors.shared - 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: {processors.cache}
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {hbm}
}}
"""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the libraries' own words on the error stream, that there is no driver."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
