"""What a finished run's updates did, recomputed from its checkpoints.

A checkpoint holds the state with which its step begins, and a step depends on nothing else: so the
update of that step is taken again and measured, at any probe set.
"""

import json

import jax
import numpy as np

from jaxdyn.paths import AnyPath, open_path
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.saved import open_run, require_policy


def analyze(
    run: str | AnyPath, output: str | AnyPath | None = None, progress: Progress | None = None
) -> AnyPath:
    """Measure the update that follows each kept checkpoint; writes `dynamics.jsonl` and arrays.

    The files, in `analysis` in the run if no `output` is given, are those of the run itself. The
    last checkpoint of a finished run has no step after it: its state alone is measured, under the
    number of the step that led to it.
    """
    progress, path = progress or Progress(), open_path(run)
    output = open_path(output or path / "analysis")
    writes = jax.process_index() == 0
    with open_run(path) as saved:
        require_policy(saved)
        probe = Probe(saved.task)
        output.mkdir(parents=True, exist_ok=True)
        lines = [{"step": -1, **probe.measure_state(saved.task.params)[0]}]
        with progress.start(f"analyse {path.name}", len(saved.steps)):
            for step in saved.steps:
                if saved.follows(step):
                    before, taken = saved.take(step)
                    scalars, arrays = probe.measure(before, taken.state)
                    line = {"step": step, "cfrl/stage": taken.metrics["cfrl/stage"], **scalars}
                else:
                    scalars, arrays = probe.measure_state(saved.state(step).params)
                    line = {"step": step - 1, "cfrl/stage": saved.plan[-1].number, **scalars}
                lines.append(line)
                if writes:
                    with (output / f"step_{line['step']:06d}.npz").open("wb") as file:
                        np.savez_compressed(file, allow_pickle=False, **arrays)
                progress.advance(correlation=scalars.get("delta/correlation", float("nan")))
    if writes:
        (output / "dynamics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return output
