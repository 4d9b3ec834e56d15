"""Plans in small tiles: the same program, flop by flop and byte by byte; hardly other memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdyn.plan.tiles import MEMORIES, TILE, small_tiles
from jaxdyn.plan.topologies import tell_libtpu


@pytest.mark.slow
def test_small_tiles_change_no_count():
    pytest.importorskip("libtpu")
    worker = Path(__file__).parent / "tiles_worker.py"
    ours = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, env=ours)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    whole, small = found["whole"], found["small"]
    for same in ("flops", "collectives", "uncounted", "bytes_by_role"):
        assert small[same] == whole[same]
    # Which arrays stay in a core's memory comes out otherwise, and so do these two.
    assert small["own"] == pytest.approx(whole["own"], rel=0.1)
    assert small["bytes"] == pytest.approx(whole["bytes"], rel=0.2)


def test_what_small_tiles_set_free_is_taken_from_the_whole():
    options, flags = small_tiles("v6e")
    assert options == {"xla_tpu_scoped_vmem_limit_kib": str(TILE)}
    assert flags == [f"--xla_tpu_override_vmem_size_kib={128 * 1024 - (32 * 1024 - TILE)}"]
    assert small_tiles("v4") == (None, []) and "v4" not in MEMORIES


def test_flags_given_by_hand_stay(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=1")
    tell_libtpu("--one=2", "--two=2")
    assert os.environ["LIBTPU_INIT_ARGS"] == "--one=1 --two=2"
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    tell_libtpu("--two=2")
    assert os.environ["LIBTPU_INIT_ARGS"] == "--two=2"
