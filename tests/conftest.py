"""Strict by default: 8 devices, no implicit rank promotion, checked shapes, warnings as errors.

The warnings' filters are in setup.cfg.
"""

import gc
import importlib.metadata
import os
import shutil
import typing
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait for work by spinning
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start write theirs down
# Programs that run once on a few numbers: what takes time is to compile them, so plainly, here and
# in processes that tests start. The memory and flops that XLA counts hardly change (below 0.1 %).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a line of Python an operation
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has its parent's
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    )
    # XLA aborts on what it does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What is compiled is kept, for all that compile the same: workers, processes that tests start, and
# the next time. JAX looks it up by the program, the flags and the release.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / "compiled"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Runs make durable what they write, and a disk has them wait: a tenth of what tests of them take,
# and a third where others write to it too.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2**32:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import jaxdyn  # noqa: F401  # isort: skip  # before JAX: it hides a CUDA plugin without a driver

import jax
import pytest
from flax.linen import linear
from jaxtyping import install_import_hook

COMPILED = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_numpy_rank_promotion", "raise")
# Flax types a field of its layers by a protocol, which beartype can check only if told so.
typing.runtime_checkable(linear.PromoteDtypeFn)
install_import_hook("jaxdyn", "beartype.beartype")
# To trace is to make many objects that stay: to look through them all, time and again, costs a
# tenth of the suite.
gc.set_threshold(200_000, 20, 20)

# The files that take longest, which are given out first, in their order (--dist loadfile): what is
# given out last should be short.
LONGEST = ("processes", "benchmarks", "quantities", "sharded", "kill", "sketch", "public_doors")
LONGEST += ("ledger", "quickstart", "claims", "influence_command", "retake", "neural_tangents")
LONGEST += ("losses", "rl", "operator", "docs", "killed_writers", "lora_runs", "resume", "plan")
LONGEST += ("device", "soak", "worker")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    gc.freeze()  # modules stay: nobody looks through them again


def pytest_sessionfinish():
    # pytest looks five times through all that is left, for what should have been closed.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Older programs go once they are many: a whole suite leaves a fifth of this."""
    size = lambda: sum(file.stat().st_size for file in COMPILED.glob("*"))
    if "PYTEST_XDIST_WORKER" not in os.environ and size() > 2**30:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


def memory_maps() -> int:
    """How many this process has; 0 where the system does not tell, and has no limit either."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_programs():
    """Free programs now and then: each holds memory maps, of which a process may have 65,530."""
    yield
    if memory_maps() > 30_000:
        jax.clear_caches()
        gc.collect()
