"""The training loop: take a step, watch what it did, write it down.

RL and supervised training supply a step; everything around it is here. A run that was killed
anywhere and starts again with the same command ends with the same metrics, bit for bit (times
apart): the state comes from the newest checkpoint, everything else from the step's number. Only a
preempted run's ledger has a segment more, since it is saved at a step of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax

from jaxdyn.config import Config
from jaxdyn.errors import Preempted
from jaxdyn.grammar import nearest
from jaxdyn.optim import Stage, StageName, stage_at, stages
from jaxdyn.storage.files import require_writable
from jaxdyn.storage.paths import AnyPath, in_bucket, open_path
from jaxdyn.storage.reading import is_number, shown
from jaxdyn.train.checkpoint import Checkpoints, require_finite
from jaxdyn.train.evaluate import evaluate, sweep_temperatures
from jaxdyn.train.preemption import Preemption
from jaxdyn.train.preference import evaluate_preferences, take_preference_step
from jaxdyn.train.probe import Probe, RunLedger, remember
from jaxdyn.train.profile import profiled, require_steps
from jaxdyn.train.progress import Progress
from jaxdyn.train.reference import reference_of, with_reference
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.sft import take_supervised_step
from jaxdyn.train.state import TrainState, begin_stage, fresh_state
from jaxdyn.train.step import Taken, take_step
from jaxdyn.train.task import LoadedModel, Task, open_task
from jaxdyn.train.trackers import require_trackers
from jaxdyn.types import JaxdynError

STEPS: dict[str, Callable[[Any, TrainState, Stage, int], Taken]] = {
    "rl": take_step,
    "sft": take_supervised_step,
    "reward": take_preference_step,
}
"""How each kind of run takes a step."""

EVALUATE = {"rl": evaluate, "sft": evaluate, "reward": evaluate_preferences}
"""How it is evaluated; temperatures are of kinds that sample."""

SHOWN = {
    "rl": ("reward",),
    "sft": ("loss", "eval_reward"),
    "reward": ("loss", "accuracy", "eval_accuracy"),
}
"""The metrics that the progress bar shows, where a step has them."""

WHAT = {"rl": "prompts", "sft": "prompts", "reward": "pairs"}
"""What is too long, or not."""


def run(
    config: Config,
    progress: Progress | None = None,
    at_end: Callable[[Task, TrainState, RunDirectory], None] | None = None,
) -> AnyPath:
    """Run, or resume, the run that `config` describes; returns its directory.

    Args:
      at_end: what is left to do with the last state, before the directory is closed.

    Raises:
      JaxdynError: for what the user can mend, before any work; and, naming the step and the last
        good checkpoint, when a metric stops being finite.
      Preempted: after SIGTERM, once the step in progress is saved.
    """
    plan = plan_of(config)
    require_steps(config.profile, plan[-1].end)
    require_trackers(config.train.trackers)
    output = open_path(config.output)
    if in_bucket(output) or jax.process_index() == 0:
        require_writable(output)
    task = open_task(config)
    require_untied(task, plan)
    keep, metric = config.train.keep_checkpoints, config.train.keep_best
    with (
        RunDirectory(config.output, config, writes=jax.process_index() == 0) as directory,
        Checkpoints(directory.checkpoints, keep, metric) as checkpoints,
    ):
        progress = progress or Progress()
        say_about_data(task, progress)
        begun = begin(task, directory, checkpoints)
        # From here on the start is wanted as a reference at most: what else it takes is freed.
        task = dataclasses.replace(task, params=reference_of(task.params, config) or {})
        state = train(task, plan, begun, directory, checkpoints, progress)
        if at_end is not None:
            at_end(task, state, directory)
    return directory.path


class Begun(NamedTuple):
    """Where a run stands as the loop begins, and its probe if it has one."""

    state: TrainState
    position: dict[str, Any]
    probe: Probe | None


def begin(task: Task, directory: RunDirectory, checkpoints: Checkpoints) -> Begun:
    """The newest checkpoint, or the start, which is recorded."""
    checkpoints.tidy()
    saved = checkpoints.steps()
    directory.require_whole(task.config, saved[-1] if saved else None)
    state, position = begin_or_resume(task, task.config, checkpoints)
    probe = Probe(task) if task.config.probe.every else None
    if saved:
        directory.rewind(position["step"])
    else:
        directory.rewind(-1)
        record_start(task, probe, directory)
    return Begun(state, position, probe)


def train(
    task: Task,
    plan: tuple[Stage, ...],
    begun: Begun,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    progress: Progress,
) -> TrainState:
    """The loop; returns the last state."""
    config, take = task.config, STEPS[task.config.kind]
    state, position, probe = begun
    del begun  # updates donate the state
    ledger = None
    if probe and config.probe.ledger:
        kept = directory.read("ledger.jsonl")
        ledger = RunLedger(probe, state.params, position["step"], kept)

    first, last = position["step"], plan[-1].end
    if position.get("reached"):
        last = first
    title = f"{directory.path.name} · {config.title}"
    with progress.start(title, last, first), Preemption() as preemption:
        for step in profiled(range(first, last), config.profile, directory.local / "profile"):
            stage = stage_at(plan, step)
            if step == stage.start > 0:
                state = begin_stage(task.layout, config.optim, stage, state)
            before = remember(state) if probe and probe.due(step) else None
            state, metrics, num_tokens, completions = take(task, state, stage, step)
            require_finite(metrics, step, checkpoints)
            if probe and before is not None:
                after = probe.look(state.params)
                scalars, arrays = probe.measure(before, state, after)
                if ledger:
                    directory.log("ledger.jsonl", ledger.close(state.params, step + 1, after))
                    scalars |= ledger.totals()
                record_probe(directory, step, {"cfrl/stage": stage.number, **scalars}, arrays)
            position["num_tokens"] += num_tokens
            position["time/wall"] += metrics["step_time"]
            totals = {name: position[name] for name in ("num_tokens", "time/wall")}
            metrics = {"step": step, **metrics, **totals}

            ends, every = step + 1 == last, config.evaluation.every
            if ends or (every and (step + 1) % every == 0):
                sampled = EVALUATE[config.kind](task, state.params, directory, step)
                measured = sampled[1]
                metrics |= as_evaluation(measured)
                goal = config.train.target_reward
                position["reached"] = bool(goal and measured.get("reward", -math.inf) >= goal)
                ends = ends or position["reached"]
                if ends:
                    sweep_temperatures(task, state.params, directory, step, sampled)
            directory.log("metrics.jsonl", metrics)
            directory.log("completions.jsonl", *completions)

            preempted = not ends and preemption.reached()
            due = ends or (step + 1) % config.train.checkpoint_every == 0
            due = due or checkpoints.improves(metrics)
            if due or preempted:
                position |= {"step": step + 1, "stage": stage.name, "preempted": not due}
                if ledger and ledger.step <= step:
                    directory.log("ledger.jsonl", ledger.close(state.params, step + 1))
                directory.publish()
                checkpoints.save(step + 1, state, position, metrics)
            shown = (name for name in SHOWN[config.kind] if name in metrics)
            progress.advance(**{name: metrics[name] for name in shown})
            if preempted:
                checkpoints.wait()
                raise Preempted(f"preempted; {step + 1} of {last} steps are in {directory.path}")
            if ends:
                break
    return state


def record_start(task: Task, probe: Probe | None, directory: RunDirectory) -> None:
    """The state before training, as step -1."""
    sampled = EVALUATE[task.config.kind](task, task.params, directory, step=-1)
    baseline = as_evaluation(sampled[1])
    directory.log("metrics.jsonl", {"step": -1, **baseline, **about_data(task)})
    sweep_temperatures(task, task.params, directory, -1, sampled)
    require_measured(task.config.train.keep_best, baseline)
    if probe is not None:
        record_probe(directory, -1, *probe.measure_state(task.params))


def about_data(task: Task) -> dict[str, int]:
    """What the data lack that a run could not use, or not whole; only what there is."""
    counts = {f"overlong_{name}": count for name, count in task.overlong.items()}
    counts["left_out"] = task.left_out
    return {f"data/{name}": count for name, count in counts.items() if count}


def say_about_data(task: Task, progress: Progress) -> None:
    """The same in words."""
    say = lambda text: progress.console.print(text, highlight=False, soft_wrap=True)
    if task.left_out:
        say(f"{task.left_out} rows of {task.config.data.name} are of no use and left out")
    long = " and ".join(f"{count} {name}" for name, count in task.overlong.items() if count)
    became = "are cut at their beginning" if task.cuts else "are left out"
    if long:
        limit, what = task.config.train.longest, WHAT[task.config.kind]
        say(f"{long} {what} of more than {limit} tokens {became} (data.overlong)")


def record_probe(
    directory: RunDirectory, step: int, scalars: dict[str, Any], arrays: dict[str, Any]
) -> None:
    """A line of `dynamics.jsonl`, and the arrays over sites."""
    directory.log("dynamics.jsonl", {"step": step, **scalars})
    directory.save_arrays(step, arrays)


def as_evaluation(measured: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation as they are logged beside a step's own."""
    return {f"eval_{name}": value for name, value in measured.items()}


# -- how a run begins -----------------------------------------------------------------------------


def plan_of(config: Config) -> tuple[Stage, ...]:
    """The run's stages; JaxdynError if it would have no step at all."""
    plan = stages(config.optim.schedule, config.train.steps, config.optim.classifier_steps)
    if not plan:
        raise JaxdynError(
            f"nothing to do: train.steps is {config.train.steps} and optim.classifier_steps "
            f"{config.optim.classifier_steps} under the schedule {config.optim.schedule}"
        )
    return plan


def begin_or_resume(
    loaded: LoadedModel, config: Config, checkpoints: Checkpoints, step: int | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state and position of a checkpoint (the newest), or those a run starts with."""
    position: dict[str, Any] = {
        "step": 0,
        "seed": config.seed,
        "stage": plan_of(config)[0].name,
        "num_tokens": 0,
        "time/wall": 0.0,
        "reached": False,
    }
    if saved := checkpoints.steps():
        found = checkpoints.position(saved[-1] if step is None else step)
        position = require_position(found, position, checkpoints)

    def fresh(params):
        about = config.optim, position["stage"], config.critic
        return with_reference(fresh_state(loaded.model, params, *about), config)

    if saved:
        like = loaded.layout.shapes(jax.eval_shape(fresh, loaded.params))
        return checkpoints.state(position["step"], like), position
    return loaded.layout.place(fresh(loaded.params)), position


def require_position(found: Any, like: dict[str, Any], checkpoints: Checkpoints) -> dict[str, Any]:
    """A checkpoint's position, if it has all fields of the start's, of their types."""
    there = {"reached": False, **found} if isinstance(found, dict) else {}
    for name, value in like.items():
        got: Any = there.get(name)
        right = is_number(got) if isinstance(value, float) else type(got) is type(value)
        if not right or (isinstance(got, int | float) and got < 0):
            raise JaxdynError(
                f"a position in {checkpoints.directory} is damaged: its {name} is {shown(got)}"
            )
    if there["stage"] not in get_args(StageName):
        raise JaxdynError(
            f"a position in {checkpoints.directory} is damaged: its stage is {there['stage']!r:.40}"
        )
    return there


def require_measured(metric: str, baseline: dict[str, float]) -> None:
    """The metric that chooses the best checkpoint has to be one that evaluations measure."""
    if metric and metric not in baseline:
        raise JaxdynError(
            f"train.keep_best is {metric}, which no evaluation measures{nearest(metric, baseline)}"
        )


def require_untied(task: Task, plan: tuple[Stage, ...]) -> None:
    """A stage that moves the classifier alone needs a classifier that is not the embedding."""
    config = task.config
    if task.model.config.tied and any(stage.name == "classifier" for stage in plan):
        raise JaxdynError(
            f"schedule {config.optim.schedule} moves the classifier alone, but {config.model.path} "
            "ties it to the embedding; set model.untie to give it a copy of its own"
        )
    if task.model.config.tied and config.optim.spills:
        raise JaxdynError(
            f"schedule {config.optim.schedule} changes the classifier's steps, but "
            f"{config.model.path} ties it to the embedding; set model.untie"
        )
    if task.model.config.tied and config.optim.classifier_multiplier != 1:
        raise JaxdynError(
            f"optim.classifier_multiplier is of a classifier of its own, but {config.model.path} "
            "ties it to the embedding; set model.untie, got "
            f"{config.optim.classifier_multiplier}"
        )
