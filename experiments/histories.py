"""What claims about whole trainings read of them: their evaluations, arm by arm, seed by seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frame import arms, trainings

from jaxdyn.report import Run, load_run

History = dict[str, Any]
"""Of a run: `base`, its base model's name, and lists over its evaluations: `steps` taken, `reward`,
`entropy` (nats a token), `unique` (share of a prompt's completions), `best` (the best of all that
an evaluation samples of a prompt, reward), `kl` to the start (nats a token), `tokens` and `seconds`
spent."""

Histories = dict[str, dict[str, History]]
"""By arm and seed."""

MEASURES = {
    "reward": "eval_reward",
    "entropy": "eval_entropy",
    "confidence": "eval_confidence/max_prob",
    "unique": "eval_diversity/unique",
    "length": "eval_completions/mean_length",
}
KL_STEPS = 5
"""The KL is of the batches of so many steps before an evaluation."""


def history(path: Path) -> History:
    """A run's evaluations."""
    run = load_run(path)
    lines = [line for line in run.metrics if "eval_reward" in line]
    kl = run.series("kl")
    found: History = {"base": base_of(run), "steps": [line["step"] + 1 for line in lines]}
    for name, key in MEASURES.items():
        found[name] = [line.get(key) for line in lines]
    most = max((key for key in lines[0] if key.startswith("eval_best_of@")), key=sample_size)
    found["best"] = [line.get(most) for line in lines]
    found["tokens"] = [line.get("num_tokens", 0) for line in lines]
    found["seconds"] = [line.get("time/wall", 0.0) for line in lines]
    recent = lambda step: [kl[s] for s in range(step - KL_STEPS, step) if s in kl]
    found["kl"] = [float(np.mean(recent(s))) if recent(s) else 0.0 for s in found["steps"]]
    return found


def sample_size(key: str) -> int:
    """N of a metric best_of@N; 0 of an interval's end."""
    number = key.rpartition("@")[2]
    return int(number) if number.isdigit() else 0


def base_of(run: Run) -> str:
    """The name of the model that it started from."""
    return Path(run.config["model"]["path"]).name


def histories(runs: Path, names: Sequence[str] | None = None) -> Histories:
    """Of the arms that are there, or of those of them that are named; runs that ended alone."""
    wanted = [arm for arm in arms(runs) if names is None or arm in names]
    found = {
        arm: {p.name: history(p) for p in trainings(runs, arm) if (p / "done").exists()}
        for arm in wanted
    }
    return {arm: seeds for arm, seeds in found.items() if seeds}


def shared(found: Histories, *names: str) -> list[str]:
    """The seeds that all of these arms have."""
    seeds = set.intersection(*(set(found.get(name, {})) for name in names))
    return sorted(seeds, key=lambda seed: int(seed.removeprefix("seed-")))


def at(run: History, measure: str, step: float | None = None) -> float:
    """A measure after so many steps, between evaluations on the line; at the end if not given."""
    if step is None:
        return float(run[measure][-1])
    return float(np.interp(step, run["steps"], run[measure]))


def reaching(run: History, measure: str, level: float) -> float:
    """The step at which a measure that rises first is at a level; the last one if it never is."""
    values, steps = run[measure], run["steps"]
    for place, value in enumerate(values):
        if value >= level:
            if place == 0 or value == values[place - 1]:
                return float(steps[place])
            share = (level - values[place - 1]) / (value - values[place - 1])
            return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))
    return float(steps[-1])


def at_equal(
    one: History, other: History, measure: str, equal: str, level: float = float("inf")
) -> tuple[float, float]:
    """A measure of both where `equal` is at a level, or the most that both come to if less."""
    level = min(level, max(one[equal]), max(other[equal]))
    first, second = (at(run, measure, reaching(run, equal, level)) for run in (one, other))
    return first, second


def rise(run: History, measure: str, step: int | None = None) -> float:
    """Its change since the start."""
    return at(run, measure, step) - float(run[measure][0])


def best_elsewhere(found: Histories, names: Sequence[str], seed: str, measure: str) -> str:
    """The arm of these with the largest last `measure`, a mean over the other seeds."""
    others = [s for s in shared(found, *names) if s != seed] or [seed]
    return max(names, key=lambda arm: float(np.mean([at(found[arm][s], measure) for s in others])))


def differences(found: Histories, arm: str, other: str, of: Any) -> list[float]:
    """`of` a run of `arm` less that of its pair, over the seeds that both have."""
    return [of(found[arm][s]) - of(found[other][s]) for s in shared(found, arm, other)]


def band(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds, and it less and plus two standard errors."""
    values = np.asarray(rows, float)
    mean = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * mean
    return mean, mean - 2 * error, mean + 2 * error
