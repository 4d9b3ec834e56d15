"""What a finished run's updates did, recomputed from its checkpoints.

A checkpoint holds the state with which its step begins, and a step depends on nothing else: so the
update of that step is taken again and measured, at any probe set.
"""

import json

import jax

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import read_object
from jaxdyn.storage.files import is_unfinished, require_writable, write_file
from jaxdyn.storage.paths import AnyPath, absolute, open_path
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.run_directory import packed
from jaxdyn.train.saved import open_run, require_policy

FORMAT = "jaxdyn analysis 1"


def analyze(
    run: str | AnyPath, output: str | AnyPath | None = None, progress: Progress | None = None
) -> AnyPath:
    """Measure the update that follows each kept checkpoint; writes `dynamics.jsonl` and arrays.

    The files, in `analysis` in the run if no `output` is given, are those of the run itself; and
    `analysis.json`, by which an earlier analysis is known, which is replaced. The last checkpoint
    of a finished run has no step after it: its state alone is measured, under the number of the
    step that led to it.

    Raises:
      JaxdynError: if there is no such run, or the output holds anything but an analysis.
    """
    progress, path = progress or Progress(), open_path(run)
    output = open_path(output or path / "analysis")
    writes = jax.process_index() == 0
    with open_run(path) as saved:
        require_policy(saved)
        if writes:
            require_analysis(output)
        probe = Probe(saved.task)
        if writes:
            described = {"format": FORMAT, "run": str(absolute(path))}
            write_file(output / "analysis.json", json.dumps(described) + "\n")
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
                    write_file(output / f"step_{line['step']:06d}.npz", packed(arrays))
                progress.advance(correlation=scalars.get("delta/correlation", float("nan")))
    if writes:
        write_file(output / "dynamics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        ours = {f"step_{line['step']:06d}.npz" for line in lines}
        for stale in output.glob("step_*.npz"):
            if stale.name not in ours:
                stale.unlink()
    return output


def require_analysis(output: AnyPath) -> None:
    """JaxdynError if the output holds anything but an analysis, or cannot be written."""
    mark = output / "analysis.json"
    if mark.exists() and read_object(mark).get("format") != FORMAT:
        raise JaxdynError(f"{mark} is not of an analysis; choose another output")
    held = sorted(path.name for path in output.glob("*") if not is_unfinished(path))
    if held and not mark.exists():
        raise JaxdynError(f"{output} already holds {held[0]}; choose another output")
    require_writable(output)
