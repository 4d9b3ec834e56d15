"""What the benchmarks' tests share."""

import jaxtyping
import pytest


@pytest.fixture
def untyped():
    """Lowering puts descriptions into a batch where its types want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
