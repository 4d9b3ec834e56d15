"""What an update sends under fsdp, in programs compiled for a GPU's host and a TPU slice."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

LAYERS, ROWS, COMPLETION = 2, 16, 32


def has_cuda_plugin() -> bool:
    try:
        return importlib.metadata.version("jax-cuda12-plugin") == jaxlib.__version__
    except importlib.metadata.PackageNotFoundError:
        return False


CUDA = pytest.mark.skipif(not has_cuda_plugin(), reason="no CUDA plugin: extra plan-gpu")
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: extra plan")


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, devices, width",
    [pytest.param("h100:8", 8, 64, marks=CUDA), pytest.param("v5p-8", 4, 512, marks=TPU)],
)
def test_parameters_are_gathered_twice_and_gradients_scattered_once(topology, devices, width):
    worker = Path(__file__).parent / "collectives_worker.py"
    ours = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, worker, topology, str(width)], capture_output=True, text=True, env=ours
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    moved = {kind.split()[0]: 0 for kind in found["collectives"]["arrays"]}
    for kind, nbytes in found["collectives"]["arrays"].items():
        if kind.endswith(" of 1"):
            continue  # a group of one device: nothing is sent
        assert kind.endswith(f" of {devices}")
        moved[kind.split()[0]] += nbytes
    matrices = LAYERS * 12 * width**2  # numbers, of two or four bytes each
    assert 2 * 2 * matrices <= moved["all-gather"]
    assert 2 * matrices <= moved["reduce-scatter"]
    # What is summed on every device: W's share of the features' cotangents, then norms and biases,
    # and the log-probs' statistics; not even one layer's gradients.
    cotangents = 4 * ROWS * COMPLETION * width
    assert moved["all-reduce"] - cotangents < 2 * matrices / LAYERS
    assert not found["uncounted"]
