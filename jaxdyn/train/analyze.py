"""What a finished run's updates did, recomputed from its checkpoints.

A checkpoint holds the state with which its step begins, and a step depends on nothing else: so the
update of that step is taken again and measured, at any probe set.
"""

import dataclasses
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig, load_config
from jaxdyn.distributed import MeshConfig, make_mesh
from jaxdyn.hosts import fetch
from jaxdyn.models import merge_adapters, save_pretrained
from jaxdyn.optim import stage_at
from jaxdyn.paths import AnyPath, in_bucket
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.rl import begin_or_resume, begin_stage, plan_of, take_step
from jaxdyn.train.task import Task, open_task
from jaxdyn.types import JaxdynError


def open_run(run: AnyPath) -> tuple[RunConfig, Task, Checkpoints]:
    """A run's configuration, what it works on, and its checkpoints (at least one).

    It is opened on the run's own mesh or, where that does not fit, on this machine's devices.

    Raises:
      JaxdynError: if the directory holds no run, or a run without a whole checkpoint.
    """
    if not (run / "config.json").exists():
        raise JaxdynError(f"{run} holds no run: it has no config.json")
    config = load_config(RunConfig, run / "config.json")
    try:
        make_mesh(config.mesh)
    except JaxdynError:
        config = dataclasses.replace(config, mesh=MeshConfig())
    checkpoints = Checkpoints(run / "checkpoints", metric=config.train.keep_best)
    if not checkpoints.steps():
        raise JaxdynError(f"{run} has no whole checkpoint yet; start the run again to go on")
    return config, open_task(config, config.train.max_prompt_length), checkpoints


def analyze(run: AnyPath, output: AnyPath, progress: Progress | None = None) -> AnyPath:
    """Measure the update that follows each kept checkpoint; writes `dynamics.jsonl` and arrays.

    The files are those of the run directory itself. The last checkpoint of a finished run has no
    step after it: its state alone is measured, under the number of the step that led to it.
    """
    progress = progress or Progress()
    config, task, checkpoints = open_run(run)
    plan = plan_of(config)
    reference = jax.tree.map(jnp.copy, task.model.view(task.params))
    probe = Probe(task, config, reference)
    steps = checkpoints.steps()
    writes = jax.process_index() == 0
    output.mkdir(parents=True, exist_ok=True)
    lines = [{"step": -1, **probe.measure_state(reference)[0]}]
    with progress.start(f"analyse {run.name}", len(steps)):
        for saved in steps:
            state, _ = begin_or_resume(task, config, plan, checkpoints, saved)
            if saved == plan[-1].end:
                scalars, arrays = probe.measure_state(task.model.view(state.params))
                line = {"step": saved - 1, "cfrl/stage": plan[-1].number, **scalars}
            else:
                stage = stage_at(plan, saved)
                if saved == stage.start > 0:
                    state = begin_stage(task.layout, config, stage, state)
                before = probe.remember(state)
                state, _, _ = take_step(task, config, reference, state, stage, saved)
                scalars, arrays = probe.measure(before, state)
                line = {"step": saved, "cfrl/stage": stage.number, **scalars}
            lines.append(line)
            if writes:
                with (output / f"step_{line['step']:06d}.npz").open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **arrays)
            progress.advance(correlation=scalars.get("delta/correlation", float("nan")))
    if writes:
        (output / "dynamics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return output


def export(run: AnyPath, output: AnyPath, step: int | Literal["best"] | None = None) -> AnyPath:
    """Write a checkpoint of a run (the newest) as a Hugging Face directory, adapters merged."""
    if in_bucket(output):
        raise JaxdynError(f"a model is written on disk, got {output}")
    config, task, checkpoints = open_run(run)
    step = checkpoints.find(step)
    if output.exists() and any(output.iterdir()):
        raise JaxdynError(f"{output} is not empty; choose another output")
    state, _ = begin_or_resume(task, config, plan_of(config), checkpoints, step)
    policy = fetch({part: state.params[part] for part in ("backbone", "classifier")})
    if jax.process_index() == 0:
        model, policy = merge_adapters(task.model, policy)
        save_pretrained(output, model, policy, stop_ids=task.tokenizer.stop_ids)
        task.tokenizer.save(output)
    return output
