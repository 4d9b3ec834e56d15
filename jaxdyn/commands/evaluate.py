"""`jaxdyn evaluate`: a run's checkpoint or a model on held-out prompts, by temperature.

Prints a table and writes the same as JSON, with every completion. The prompts and the key are those
of the run's own evaluations: at the run's settings the numbers are the logged ones.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jaxdyn.commands.evaluate_options import EvaluateOptions
from jaxdyn.config import KINDS, Config
from jaxdyn.grammar import load_config
from jaxdyn.presets import RL, preset
from jaxdyn.sections import ModelSource
from jaxdyn.storage.files import require_writable, write_file
from jaxdyn.storage.paths import AnyPath, open_path
from jaxdyn.train.evaluate import sample_held_out
from jaxdyn.train.loop import say_about_data
from jaxdyn.train.progress import Progress
from jaxdyn.train.saved import open_run, require_policy
from jaxdyn.train.task import Task, open_task
from jaxdyn.types import JaxdynError, Params


def run(options: EvaluateOptions, progress: Progress | None = None) -> AnyPath:
    """Sample, measure, print and write; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the file, the run, the step, the options.
    """
    path = options.destination
    require_writable(path.parent)
    if path.exists():
        raise JaxdynError(f"{path} already exists; choose another --output")
    progress = progress or Progress()
    task, params, step = open_policy(options)
    config = task.config
    own = config.sampling.temperature
    temperatures = tuple(sorted({*(options.temperatures or (own,))}))
    lines = []
    say_about_data(task, progress)
    name = open_path(options.run or str(options.model)).resolve().name
    with progress.start(f"evaluate {name}", len(temperatures)):
        for temperature in temperatures:
            experience, metrics = sample_held_out(task.at_temperature(temperature), params)
            samples = experience.records()
            lines.append({"temperature": temperature, **metrics, "samples": samples})
            reward = metrics.get("reward", math.nan)  # nothing may have been scored
            progress.advance(temperature=temperature, reward=reward)
    about = {"run": options.run, "model": options.model, "step": step}
    if jax.process_index() == 0:
        found = {**about, "config": dataclasses.asdict(config), "temperatures": lines}
        write_file(path, json.dumps(found, ensure_ascii=False) + "\n")
    print_table(name if step is None else f"{name}, step {step}", config, lines)
    return path


def open_policy(options: EvaluateOptions) -> tuple[Task, Params, int | None]:
    """What a run works on, told the options, the policy's parameters and its step."""
    if options.run is None:
        config: Config = preset(RL, options.preset) if options.preset else from_file(options)
        config = dataclasses.replace(config, model=ModelSource(str(options.model), options.untie))
        task = open_task(dataclasses.replace(config, **chosen(config, options)))
        return task, task.params, None
    with open_run(options.run) as run:
        require_policy(run)
        step = run.find(options.step)
        task = run.task.told(**chosen(run.config, options))
        return task, run.state(step).params, step


def from_file(options: EvaluateOptions) -> Config:
    """The configuration that --config names: a file, or a run's directory."""
    path = open_path(str(options.config))
    return load_config(KINDS, path / "config.json" if path.is_dir() else path)


def chosen(config: Config, options: EvaluateOptions) -> dict[str, Any]:
    """What the options change of the configuration."""
    names = ("num_prompts", "num_generations", "metrics", "pass_at", "success_threshold")
    given: dict[str, Any] = {n: v for n in names if (v := getattr(options, n)) is not None}
    if "num_generations" in given:  # the run's own sizes may not fit
        given.setdefault("pass_at", ())
    evaluation = dataclasses.replace(config.evaluation, temperatures=options.temperatures, **given)
    seed = config.seed if options.seed is None else options.seed
    return {"evaluation": evaluation, "seed": seed}


def print_table(name: str, config: Config, lines: Sequence[dict[str, Any]]) -> None:
    """A row a measure, a column a temperature."""
    evaluation = config.evaluation
    each = evaluation.num_generations
    prompts = len(lines[0]["samples"]) // each
    judge = evaluation.metrics[0] if evaluation.metrics else "reward"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for line in lines:
        greedy = line["temperature"] == 0
        heading = "greedy" if greedy else f"temperature {line['temperature']:g}"
        table.add_column(heading, justify="right")
    shown = {"reward": "reward"}
    kinds = (("metrics/", "{}"), ("pass@", "pass@{}"), ("best_of@", "best of {}"))
    for prefix, words in kinds:
        for key in lines[0]:
            if key.startswith(prefix) and "_ci_" not in key:
                shown[key] = words.format(key.removeprefix(prefix))
    shown |= {
        "diversity/unique": "unique completions",
        "diversity/vendi": "diversity (Vendi score)",
        "diversity/self_bleu": "likeness (self-BLEU)",
        "entropy": "entropy (nats)",
        "completions/mean_length": "mean length (tokens)",
    }
    for key, words in shown.items():
        table.add_row(words, *(cell(line, key) for line in lines))
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    say(f"{name}: {prompts} held-out prompts, {each} completions each")
    console.print(table)
    say(f"correct: {judge} at least {evaluation.success_threshold:g}; 95 % intervals over prompts")


def cell(line: dict[str, Any], key: str) -> str:
    """A value with its interval, if it has one."""
    if key not in line or (key == "entropy" and line["temperature"] == 0):
        return "–"
    low, high = line.get(f"{key}_ci_low"), line.get(f"{key}_ci_high")
    interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
    return f"{line[key]:.3f}{interval}"
