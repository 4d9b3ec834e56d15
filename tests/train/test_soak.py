"""Four hundred steps in one process: nothing that a run holds or writes grows with its length."""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from jaxdyn.train import loop, run_rl

pytestmark = pytest.mark.slow

STEPS, EVERY = 400, 25


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def written(run: Path) -> int:
    """Bytes of the run's logs."""
    return sum(path.stat().st_size for path in run.glob("*.jsonl"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell")
def test_a_long_run_holds_and_writes_no_more_than_a_short_one(tmp_path, monkeypatch):
    changes = {"train__steps": STEPS, "train__checkpoint_every": 50, "train__keep_checkpoints": 2}
    changes |= {
        "evaluation__every": 50,
        "probe__every": EVERY,
        "sampling__max_completion_length": 2,
    }
    config = tiny_runs.rl_config(tmp_path, "run", **changes)
    take, compiled, seen = loop.STEPS["rl"], [], {}

    def watched(task, state, stage, step):
        if step % EVERY == 0:
            gc.collect()
            descriptors = len(os.listdir("/proc/self/fd"))
            arrays = len(jax.live_arrays())
            files = written(tmp_path / "run")
            seen[step] = resident(), descriptors, arrays, files, len(compiled)
        return take(task, state, stage, step)

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    monkeypatch.setitem(loop.STEPS, "rl", watched)
    gc.freeze()  # what earlier tests left: not looked through sixteen times
    jax.monitoring.register_event_duration_secs_listener(count)
    run_rl(config)
    gc.unfreeze()

    memory, descriptors, arrays, files, programs = np.array(list(seen.values())).T
    settled = 4  # a hundred steps, in which everything has happened once
    assert programs[0] > 0 and (programs[settled:] == programs[settled]).all()
    # A save in the background holds some for a while: of each half, where there is none.
    half = settled + (len(seen) - settled) // 2
    assert min(descriptors[half:]) <= min(descriptors[settled:half])
    assert min(arrays[half:]) <= min(arrays[settled:half])
    assert memory[-1] - memory[settled] < 16 * 2**20
    each = np.diff(files)[settled - 1 :] / EVERY
    assert each.max() < 1.2 * each.min()
