"""The RL loop: take a step, watch what it did, write it down.

A run that was killed anywhere and starts again with the same command ends with the same metrics,
bit for bit (times apart): the state comes from the newest checkpoint, everything else from the
step's number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import RunConfig, nearest
from jaxdyn.errors import Preempted
from jaxdyn.models import init_value_head
from jaxdyn.optim import Stage, make_optimizer, stage_at, stages, trainable
from jaxdyn.paths import AnyPath, open_path, require_writable
from jaxdyn.train.checkpoint import Checkpoints, require_finite
from jaxdyn.train.evaluate import evaluate
from jaxdyn.train.preemption import Preemption
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.step import begin_stage, take_step
from jaxdyn.train.task import Task, open_task
from jaxdyn.train.update import TrainState
from jaxdyn.types import JaxdynError, Params


def run_rl(config: RunConfig, progress: Progress | None = None) -> AnyPath:
    """Run, or resume, the RL run that `config` describes; returns its directory.

    Raises:
      JaxdynError: for what the user can mend, before any work; and, naming the step and the last
        good checkpoint, when a metric stops being finite.
      Preempted: after SIGTERM, once the step in progress is saved.
    """
    plan = plan_of(config)
    require_writable(open_path(config.output))
    task = open_task(config, config.train.max_prompt_length)
    require_untied(config, task, plan)
    keep, metric = config.train.keep_checkpoints, config.train.keep_best
    with (
        RunDirectory(config.output, config, writes=jax.process_index() == 0) as directory,
        Checkpoints(directory.checkpoints, keep, metric) as checkpoints,
    ):
        train(task, config, plan, directory, checkpoints, progress or Progress())
    return directory.path


def train(
    task: Task,
    config: RunConfig,
    plan: tuple[Stage, ...],
    directory: RunDirectory,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """The loop, from the newest checkpoint or the start."""
    state, position = begin_or_resume(task, config, plan, checkpoints)
    reference = jax.tree.map(jnp.copy, task.model.view(task.params))
    probe = Probe(task, config, reference)
    if checkpoints.steps():
        directory.rewind(position["step"])
    else:
        directory.rewind(-1)
        baseline = evaluate(task, reference, config, directory, step=-1, sweep=True)
        require_measured(config.train.keep_best, baseline)
        probe.record_start(directory)

    first, last = position["step"], plan[-1].end
    title = f"{directory.path.name} · {config.optim.schedule}"
    with progress.start(title, last, first), Preemption() as preemption:
        for step in range(first, last):
            stage = stage_at(plan, step)
            if step == stage.start > 0:
                state = begin_stage(task.layout, config, stage, state)
            before = probe.remember(state) if probe.due(step) else None
            state, experience, metrics = take_step(task, config, reference, state, stage, step)
            require_finite(metrics, step, checkpoints)
            if before is not None:
                scalars, arrays = probe.measure(before, state)
                directory.log(
                    "dynamics.jsonl", {"step": step, "cfrl/stage": stage.number, **scalars}
                )
                directory.save_arrays(step, arrays)
            position["num_tokens"] += int(np.sum(experience.rollout.mask))
            position["time/wall"] += metrics["step_time"]
            totals = {name: position[name] for name in ("num_tokens", "time/wall")}
            metrics = {"step": step, **metrics, **totals}
            every = config.evaluation.every
            if step + 1 == last or (every and (step + 1) % every == 0):
                view = task.model.view(state.params)
                metrics |= evaluate(task, view, config, directory, step, sweep=step + 1 == last)
            directory.log("metrics.jsonl", metrics)
            readable = experience.records(step, config.train.save_completions)
            directory.log("completions.jsonl", *readable)
            preempted = step + 1 < last and preemption.reached()
            due = step + 1 == last or (step + 1) % config.train.checkpoint_every == 0
            if due or preempted or checkpoints.improves(metrics):
                position |= {"step": step + 1, "stage": stage.name}
                directory.publish()
                checkpoints.save(step + 1, state, position, metrics)
            progress.advance(reward=metrics["reward"])
            if preempted:
                checkpoints.wait()
                raise Preempted(f"preempted; {step + 1} of {last} steps are in {directory.path}")


def plan_of(config: RunConfig) -> tuple[Stage, ...]:
    """The run's stages; JaxdynError if it would have no step at all."""
    plan = stages(config.optim.schedule, config.train.steps, config.optim.classifier_steps)
    if not plan:
        raise JaxdynError(
            f"nothing to do: train.steps is {config.train.steps} and optim.classifier_steps "
            f"{config.optim.classifier_steps} under the schedule {config.optim.schedule}"
        )
    return plan


def require_measured(metric: str, baseline: dict[str, float]) -> None:
    """The metric that chooses the best checkpoint has to be one that evaluations measure."""
    if metric and metric not in baseline:
        raise JaxdynError(
            f"train.keep_best is {metric}, which no evaluation measures{nearest(metric, baseline)}"
        )


def require_untied(config: RunConfig, task: Task, plan: tuple[Stage, ...]) -> None:
    """A stage that moves the classifier alone needs a classifier that is not the embedding."""
    if task.model.config.tied and any(stage.name == "classifier" for stage in plan):
        raise JaxdynError(
            f"schedule {config.optim.schedule} moves the classifier alone, but {config.model.path} "
            "ties it to the embedding; set model.untie to give it a copy of its own"
        )


def begin_or_resume(
    task: Task,
    config: RunConfig,
    plan: tuple[Stage, ...],
    checkpoints: Checkpoints,
    step: int | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """The state and position of a checkpoint (the newest), or those a run starts with."""
    saved = checkpoints.steps()
    position: dict[str, Any] = {
        "step": 0,
        "seed": config.seed,
        "stage": plan[0].name,
        "num_tokens": 0,
        "time/wall": 0.0,
    }
    if saved:
        step = saved[-1] if step is None else step
        position = checkpoints.position(step)

    def fresh(params: Params) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        if config.loss.critic:
            params["value"] = init_value_head(task.model.config.width)
        moving, _ = trainable(config.optim, position["stage"], params)
        state = TrainState(params, make_optimizer(config.optim).init(moving))
        if task.model.config.tied:
            zeros = jnp.zeros_like(params["backbone"]["embed"]["embedding"])
            state = state.replace(head_moment=zeros, head_share=jnp.copy(zeros))
        return state

    if saved:
        like = task.layout.shapes(jax.eval_shape(fresh, task.params))
        return checkpoints.state(position["step"], like), position
    return task.layout.place(fresh(task.params)), position
