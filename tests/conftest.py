"""Strict by default: 8 devices, no implicit rank promotion, checked shapes, warnings as errors.

The warnings' filters are in setup.cfg.
"""

import os
import typing

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from flax.linen import linear
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Flax types a field of its layers by a protocol, which beartype can check only if told so.
typing.runtime_checkable(linear.PromoteDtypeFn)
install_import_hook("jaxdyn", "beartype.beartype")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_programs():
    """Free a module's programs after it: each holds memory maps, of which a process has a limit."""
    yield
    jax.clear_caches()
