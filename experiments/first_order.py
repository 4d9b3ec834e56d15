"""Does the first order hold at the steps that people take?

Claim (Tomihari 2026, arXiv 2601.04670, the NTK's decomposition): an update's effect on log π is
its first order in the step, which is the sum of the two components. The residual, actual less first
order, has to shrink as the square of the step: slope 2 on a log-log plot. One update of a batch of
completions is taken with many step sizes, along the gradient and along Adam's direction (its
moments those of several batches at the same parameters), and watched at sites of held-out prompts.

Verdict:   "first order holds" if Adam's update at the task's own learning rate leaves a residual
           below a tenth of the actual change, with its 95 % interval over batches, for the mean
           over base models; undecided where the interval has the tenth in it.
Command:   python experiments/first_order.py --model DIRECTORY --name NAME
Time:      half a minute for a small model, three minutes for 135 million parameters (--size small).
Expected:  slopes of 1.9 to 2.1 while the residual is small; a tenth at the anagram model's rate.
"""

import dataclasses
import functools
from argparse import Namespace
from typing import Any

import frame
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from frame import COLOURS, Verdict, of_size
from inference import bootstrap
from subject import (
    Subject,
    base_models,
    direction,
    gradient,
    parser,
    probe_sites,
    seeds_of,
    subjects,
    update_batches,
)

from jaxdyn.dynamics import propagate, site_state
from jaxdyn.types import Model, Params, Sites

CLAIM = "At the usual learning rate an update's effect is its first order: less than a tenth is not"
SIZES = {"toy": (2, 1, 2, 1.0), "small": (2, 2, 2, 2.0), "full": (4, 2, 4, 1.0)}
"""Batches, sites inside a completion, batches before each for Adam's moments, and log₂ of what lies
between two step sizes."""

LEAST, MOST = -4, 6
"""Of log₂ of the step size in units of the task's learning rate."""

TENTH = 0.1
SMALL = 5_000_000
"""Parameters below which all is in float64."""

FLOOR = {"float32": 3e-6, "float64": 1e-13}
"""Nats: a residual of less than ten times this is rounding."""


def pick(x: jax.Array, sites: Sites) -> np.ndarray:
    """Of [N, V] what belongs to the sites' tokens, [N]."""
    return np.asarray(jnp.take_along_axis(x, sites.targets[:, None], axis=1)[:, 0], np.float64)


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(x**2)))


def first_order(model: Model, params: Params, change: Params, sites: Sites) -> np.ndarray:
    """Δ log π of the sites' tokens per unit of a step along `change`, [N]."""
    return pick(jax.jit(propagate, static_argnums=0)(model, params, change, sites).total, sites)


def effects(
    model: Model, params: Params, change: Params, sites: Sites, unit: np.ndarray, steps: np.ndarray
) -> dict[str, list[float]]:
    """Root mean squares over sites, in nats, of params + s · change for every step s.

    `unit` is the change's `first_order`; `slope` is the regression of the actual Δ log π on it,
    through 0.
    """
    start = pick(site_state(model, params, sites).log_probs, sites)
    found: dict[str, list[float]] = {"step": steps.tolist(), "predicted": [], "actual": []}
    found |= {"residual": [], "slope": []}
    for step in steps:
        there = site_state(model, moved(params, change, step), sites).log_probs
        actual, predicted = pick(there, sites) - start, step * unit
        for name, x in (("predicted", predicted), ("actual", actual)):
            found[name].append(rms(x))
        found["residual"].append(rms(actual - predicted))
        found["slope"].append(float(actual @ predicted / (predicted @ predicted)))
    return found


@jax.jit
def moved(params: Params, change: Params, step: float) -> Params:
    """params + step · change."""
    return jax.tree.map(lambda p, d: p + jnp.asarray(step, p.dtype) * d, params, change)


def of_base(subject: Subject, size: str) -> list[dict[str, Any]]:
    """Every batch's update, by Adam and by plain gradient descent as far as Adam's reaches."""
    count, inside, history, between = of_size(SIZES, size)
    sizes = 2.0 ** np.arange(LEAST, MOST + 1, between)
    train, optim = subject.task.config.train, subject.task.config.optim
    sites = probe_sites(subject, 4 * count, inside)
    given = train.num_prompts, train.num_generations, history + count
    grads = [gradient(subject, batch) for batch in update_batches(subject, *given)]
    double = sum(x.size for x in jax.tree.leaves(subject.params)) < SMALL
    dtype = np.dtype("float64" if double else "float32")
    rows = []
    for number in range(count):
        seen = grads[number : number + history + 1]
        changes = {"adam": direction(optim, subject.params, seen)[0]}
        changes["sgd"] = jax.tree.map(jnp.negative, seen[-1])
        with jax.enable_x64(double):
            model = dataclasses.replace(subject.model, dtype=dtype.type)
            params, changes = jax.tree.map(
                functools.partial(jnp.asarray, dtype=dtype), (subject.params, changes)
            )
            units = {x: first_order(model, params, changes[x], sites) for x in changes}
            alike = rms(units["adam"]) / rms(units["sgd"])
            steps = {"adam": optim.learning_rate * sizes}
            steps["sgd"] = alike * steps["adam"]
            found = {
                x: effects(model, params, changes[x], sites, units[x], steps[x]) for x in changes
            }
        about = {
            "model": subject.name,
            "batch": number,
            "sites": len(units["adam"]),
            "rate": optim.learning_rate,
        }
        rows.append({**about, "dtype": dtype.name, **found})
    return rows


# -- what it says ---------------------------------------------------------------------------------


def slope_of(effect: dict[str, list[float]], dtype: str) -> float:
    """d log ‖residual‖ / d log step, by least squares, where it is more than rounding and less than
    a fifth of the change; NaN for fewer than three such steps."""
    step, actual, residual = (np.array(effect[x]) for x in ("step", "actual", "residual"))
    good = (residual > 10 * FLOOR[dtype]) & (residual < 0.2 * actual)
    if good.sum() < 3:
        return float("nan")
    return float(np.polyfit(np.log(step[good]), np.log(residual[good]), 1)[0])


def reach_of(effect: dict[str, list[float]]) -> float:
    """The step size at which a tenth of the change is residual, interpolated on logarithms."""
    step, actual, residual = (np.array(effect[x]) for x in ("step", "actual", "residual"))
    share = np.log(residual / actual)
    above = np.flatnonzero(share > np.log(TENTH))
    if not len(above) or above[0] == 0:
        return float("nan")
    at = slice(above[0] - 1, above[0] + 1)
    return float(np.exp(np.interp(np.log(TENTH), share[at], np.log(step[at]))))


def usual(row: dict[str, Any], key: str) -> float:
    """What Adam's update does at the task's own learning rate."""
    steps = np.array(row["adam"]["step"])
    return float(row["adam"][key][int(np.argmin(np.abs(np.log(steps / row["rate"]))))])


def over_batches(rows: list[dict[str, Any]], value) -> tuple[float, float, float]:
    """The mean over all batches' values, with its interval; what is NaN is left out."""
    found = np.array([value(row) for row in rows])
    found = found[np.isfinite(found)]
    if not len(found):
        return (float("nan"),) * 3
    return float(found.mean()), *bootstrap(found)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """From the rows alone."""
    models = len({row["model"] for row in rows})
    over = f"{len(rows)} batches, {base_models(models)}"
    ratio = lambda row: usual(row, "residual") / usual(row, "actual")
    mean, low, high = over_batches(rows, ratio)
    ruling: frame.Ruling = "undecided"
    if high < TENTH or low > TENTH:
        ruling = "supported" if high < TENTH else "not supported"
    reach = {x: over_batches(rows, lambda row, x=x: reach_of(row[x]))[0] for x in ("adam", "sgd")}
    note = (
        f"At the task's learning rate of {rows[0]['rate']:.3g}; a tenth is reached at "
        f"{reach['adam']:.2g} along Adam's direction, at {reach['sgd']:.2g} along the gradient."
    )
    statistic = "‖residual‖/‖actual‖ of Δ log π after one update by Adam"
    seeds = seeds_of(models)
    found = [Verdict(CLAIM, ruling, statistic, mean, low, high, over, seeds, note=note)]
    for name, optimizer in (("adam", "Adam"), ("sgd", "plain gradient descent")):
        slope = lambda row, name=name: slope_of(row[name], row["dtype"])
        mean, low, high = over_batches(rows, slope)
        ruling = "supported" if abs(low - 2) < TENTH > abs(high - 2) else "not supported"
        found.append(
            Verdict(
                f"What the first order leaves is of second order ({optimizer})",
                "undecided" if np.isnan(mean) else ruling,
                "slope of log ‖residual‖ against log step",
                *(mean, low, high, over, seeds),
                note="Supported if the interval lies within 1.9 to 2.1.",
            )
        )
    return found


def draw(rows: list[dict[str, Any]], name: str) -> plt.Figure:
    """Residual shares and residuals against the step, and regressions through 0."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for optimizer, colour, label in (("adam", COLOURS[0], "Adam"), ("sgd", COLOURS[1], "plain")):
        of = lambda key, x=optimizer: np.array([row[x][key] for row in rows])
        predicted, actual, residual = of("predicted"), of("actual"), of("residual")
        at = np.exp(np.log(predicted).mean(0))
        for panel, values in zip(axes, (residual / actual, residual, of("slope")), strict=True):
            panel.plot(at, values.mean(0), color=colour, marker="o", markersize=3, label=label)
            panel.fill_between(
                at, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0
            )
    middle = np.exp(np.log([usual(row, "predicted") for row in rows]).mean())
    for panel in axes:
        panel.axvline(middle, color="0.5", linestyle=":")
        panel.set(xscale="log", xlabel="first-order Δ log π, rms over sites (nats)")
    axes[0].axhline(TENTH, color="0.5", linewidth=0.7)
    axes[0].set(yscale="log", ylabel="‖residual‖ / ‖actual‖")
    square = np.exp(np.log([usual(row, "residual") for row in rows]).mean()) * (at / middle) ** 2
    axes[1].plot(at, square, color="0.5", linestyle="--", label="slope 2")
    axes[1].set(yscale="log", ylabel="‖residual‖, rms over sites (nats)")
    axes[2].axhline(1, color="0.5", linewidth=0.7)
    axes[2].set(ylabel="actual on first order, through 0", ylim=(-0.2, 2.2))
    axes[1].legend(fontsize=8, frameon=False)
    models = len({row["model"] for row in rows})
    figure.suptitle(
        f"{name}: {len(rows)} batches, {rows[0]['sites']} sites, {base_models(models)}; "
        "bands: all batches; dotted: the task's learning rate",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], list[dict[str, Any]], plt.Figure]:
    """The answer of one model."""
    rows = [row for subject in subjects(chosen) for row in of_base(subject, chosen.size)]
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "first_order", find)
