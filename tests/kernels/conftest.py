"""Kernel tests compile many programs and run each on a few numbers."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
    """The arrays are tiny: what takes time here is compiling, not running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
