"""How much of an update is representation is set by the scale of W, which no policy knows.

Claim (theory, "Gauge, and Adam"; ours): φ → c φ, W → W / c leaves the policy as it is, multiplies
the representation component of a plain gradient step by c², of an Adam step by c, and the final
normalisation's part of the gradient component by 1/c² and 1/c. So a gauge c is a learning-rate
multiplier m of the classifier (and 1/m of the final norm): m = c² for plain steps, m = c for Adam.

Every c is tried: gradients, Adam's moments and components are computed in that gauge, and compared
with what the law says from those at c = 1. Adam's ε would break the law, so it is next to 0 here;
the share with the task's own is told beside it. Shares are of Δ log π at held-out prompts' sites.

Verdict:   the law holds if the representation component's exponents lie within 0.01 of 2 and 1 for
           every batch and base model, and the policies of the two sides of m's equivalence agree
           after three steps; the share is "a matter of gauge" if it is below 0.1 at one c and above
           0.9 at another, where c goes from 1/16 to 16.
Command:   python experiments/gauge.py --model DIRECTORY --name NAME
Time:      half a minute for a small model, five minutes for 135 million parameters (--size small).
Expected:  the law; of the anagram models' steps 0.5 % (plain) and 1.5 % (Adam) are representation,
           and half at c = 8 and 27. That c is a model's own.
"""

import dataclasses
from argparse import Namespace
from typing import Any

import frame
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from first_order import rms
from frame import COLOURS, Verdict, of_size
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
from jaxdyn.kernels import component_shares
from jaxdyn.models import regauge
from jaxdyn.optim import OptimConfig
from jaxdyn.types import Components, Params, Sites

CLAIM = "Gauges from 1/16 to 16 take the representation's share from under 0.1 to over 0.9"
SIZES = {"toy": (1, 2, 3), "small": (1, 1, 3), "full": (2, 2, 7)}
"""Updates, batches of Adam's moments before each, and values of c."""

WIDEST = 16.0
EXACT = 0.01
HALF = 0.5
"""The share at which the components are even."""

MULTIPLIER, STEPS = 4.0, 3
"""Powers of two, by which floating point divides exactly: the two sides may be equal to the bit."""


def scales(count: int) -> np.ndarray:
    """Values of c from 1/16 to 16, 1 among them."""
    return WIDEST ** np.linspace(-1, 1, count)


def without_epsilon(optim: OptimConfig) -> OptimConfig:
    """Adam that knows no scale: ε below all but gradients whose squares float32 cannot hold."""
    return dataclasses.replace(optim, max_grad_norm=0.0, eps=1e-16)


def directions(subject: Subject, params: Params, grads: list[Params]) -> dict[str, Params]:
    """The last gradient's plain step and Adam's, per learning rate; "used" is Adam's with the
    task's own ε and clipping."""
    optim = subject.task.config.optim
    return {
        "plain": jax.tree.map(jnp.negative, grads[-1]),
        "adam": direction(without_epsilon(optim), params, grads)[0],
        "used": direction(optim, params, grads)[0],
    }


def parts_of(subject: Subject, params: Params, change: Params, sites: Sites) -> dict[str, Any]:
    """Components of the first-order Δ log π [N, V] along `change`: sizes and the share.

    `norm` is the final normalisation's part of the gradient component. ⟨part, part'⟩ over sites and
    vocabulary, from which the law foretells the share at any c.
    """
    along = jax.jit(propagate, static_argnums=0)
    found = along(subject.model, params, change, sites)
    still = jax.tree.map(jnp.zeros_like, change)
    backbone = {**still["backbone"], "norm": change["backbone"]["norm"]}
    norm = along(subject.model, params, {**still, "backbone": backbone}, sites).gradient
    return products(found, norm)


def products(found: Components, norm: jax.Array) -> dict[str, Any]:
    """Inner products of representation, the final norm's part and the rest of the gradient's."""
    parts = [np.asarray(x, np.float64) for x in (found.representation, norm)]
    parts.append(np.asarray(found.gradient, np.float64) - parts[1])
    return {
        "gram": [[float(np.vdot(x, y)) for y in parts] for x in parts],
        "rms": rms(parts[0]),
        "share": float(component_shares(found).representation),
    }


def share_by_law(gram: np.ndarray, scale: float, power: int) -> float:
    """The representation's share in gauge c: its part times c^p, the final norm's times c^-p."""
    factors = np.array([scale**power, scale**-power, 1.0])
    scaled = np.asarray(gram) * factors[:, None] * factors[None]
    return float(scaled[0].sum() / scaled.sum())


def even_at(gram: np.ndarray, power: int) -> float:
    """The smallest c at which half of the update is representation, by the law."""
    grid = np.geomspace(1e-3, 1e4, 4001)
    shares = np.array([share_by_law(gram, c, power) for c in grid])
    below = np.flatnonzero((shares[:-1] < HALF) & (shares[1:] >= HALF))
    return float(grid[below[0]]) if len(below) else float("nan")


def equivalence(subject: Subject, batch: Any, sites: Sites) -> dict[str, float]:
    """How far two policies are apart after some steps on one batch: of gauge c, and of c = 1 with
    the classifier's learning rate times m and the final norm's by m; relative to what they moved.
    """
    optim = without_epsilon(subject.task.config.optim)
    rate, found = optim.learning_rate, {}
    start = site_state(subject.model, subject.params, sites).log_probs
    for name, scale in (("adam", MULTIPLIER), ("plain", MULTIPLIER**0.5)):
        ends = []
        for gauge, m in ((scale, 1.0), (1.0, MULTIPLIER)):
            params, seen = regauge(subject.model, subject.params, gauge)[1], []
            for _ in range(STEPS):
                seen.append(gradient(subject, batch, params))
                step = seen[-1] if name == "plain" else direction(optim, params, seen)[0]
                size = -rate if name == "plain" else rate
                params = faster(params, step, size, m)
            ends.append(site_state(subject.model, params, sites).log_probs)
        apart = float(jnp.linalg.norm(ends[0] - ends[1]))
        found[name] = apart / float(jnp.linalg.norm(ends[1] - start))
    return found


def faster(params: Params, step: Params, size: float, multiplier: float) -> Params:
    """params + size · step, the classifier's times m and the final norm's by m."""

    def move(path, p, d):
        keys = [key.key for key in path]
        factor = {"classifier": multiplier}.get(keys[0], 1.0)
        factor = 1 / multiplier if keys[:2] == ["backbone", "norm"] else factor
        return p + size * factor * d

    return jax.tree_util.tree_map_with_path(move, params, step)


def of_base(subject: Subject, size: str) -> dict[str, Any]:
    """Every update in every gauge."""
    count, history, values = of_size(SIZES, size)
    train = subject.task.config.train
    given = train.num_prompts, train.num_generations, count + history
    batches = update_batches(subject, *given)
    sites = probe_sites(subject, 2 * max(count, 4), 2)
    gauges = []
    for scale in scales(values):
        params = regauge(subject.model, subject.params, float(scale))[1]
        grads, updates = [gradient(subject, batch, params) for batch in batches], []
        for number in range(count):
            steps = directions(subject, params, grads[number : number + history + 1])
            updates.append({x: parts_of(subject, params, d, sites) for x, d in steps.items()})
        gauges.append({"scale": float(scale), "updates": updates})
    row = {"model": subject.name, "sites": len(np.asarray(sites.rows)), "gauges": gauges}
    if size != "small":  # several updates in a row: of small models
        row["equivalence"] = equivalence(subject, batches[0], sites)
    return row


# -- what it says ---------------------------------------------------------------------------------

POWERS = {"plain": 2, "adam": 1}
"""Of c in the representation component's size, and so m = c to the power."""


def of_updates(row: dict[str, Any], name: str, key: str) -> np.ndarray:
    """One figure of every update in every gauge, [gauges, updates]."""
    return np.array([[u[name][key] for u in gauge["updates"]] for gauge in row["gauges"]])


def scales_of(row: dict[str, Any]) -> np.ndarray:
    """Its values of c; the middle one is 1."""
    return np.array([gauge["scale"] for gauge in row["gauges"]])


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """From the rows alone."""
    models, updates = len(rows), len(rows[0]["gauges"][0]["updates"])
    over, seeds = f"{models * updates} updates, {base_models(models)}", seeds_of(models)
    apart = [row["equivalence"] for row in rows if "equivalence" in row]
    where, middle = scales_of(rows[0]), len(rows[0]["gauges"]) // 2
    found = []
    for name, power in POWERS.items():
        sizes = [np.log(of_updates(row, name, "rms")) for row in rows]
        slopes = np.concatenate([np.polyfit(np.log(where), x, 1)[0] for x in sizes])
        exact = np.abs(slopes - power).max() < EXACT
        alike = all(x[name] < EXACT for x in apart)
        note = "The multiplier was not tried at this size."
        if apart:
            most = max(x[name] for x in apart)
            note = (
                f"After {STEPS} steps the policies of gauge c and of a multiplier m = "
                f"c{'²' * (power == 2)} = {MULTIPLIER:g} differ by {most:.1g} of what they moved."
            )
        found.append(
            Verdict(
                f"The representation component grows as c{'²' * (power == 2)} ({name} steps)",
                "supported" if exact and alike else "not supported",
                "exponent of its size against c; interval: all updates",
                *(float(slopes.mean()), float(slopes.min()), float(slopes.max()), over, seeds),
                note=note,
            )
        )
        shares = np.array([of_updates(row, name, "share").mean(axis=1) for row in rows])
        least, most = float(shares[:, 0].max()), float(shares[:, -1].min())
        grams = [u[name]["gram"] for row in rows for u in row["gauges"][middle]["updates"]]
        own = [of_updates(row, "used", "share")[middle].mean() for row in rows]
        used = f" With the task's own ε and clipping {np.mean(own):.3g}." if power == 1 else ""
        even = float(np.nanmedian([even_at(gram, power) for gram in grams]))
        found.append(
            Verdict(
                f"{CLAIM} ({name} steps)",
                "supported" if least < 0.1 and most > 0.9 else "not supported",
                "share as it is (c = 1); interval: from c = 1/16 to c = 16",
                *(float(shares[:, middle].mean()), least, most, over, seeds),
                note=f"Half of an update is representation at c = {even:.2g}, a multiplier of the "
                f"classifier's learning rate of {even**power:.2g}.{used}",
            )
        )
    return found


def draw(rows: list[dict[str, Any]], name: str) -> plt.Figure:
    """Shares against c, as computed and by the law; and sizes of the component."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    where = scales_of(rows[0])
    fine, middle = np.geomspace(where[0], where[-1], 200), len(where) // 2
    for (step, power), colour in zip(POWERS.items(), COLOURS, strict=False):
        law = np.zeros_like(fine)
        grams = [u[step]["gram"] for row in rows for u in row["gauges"][middle]["updates"]]
        for gram in grams:
            law += [share_by_law(gram, c, power) / len(grams) for c in fine]
        left.plot(fine, law, color=colour, label=f"{step}, by the law from c = 1")
        sizes = []
        for row in rows:
            left.plot(where, of_updates(row, step, "share"), "o", color=colour, markersize=3)
            size = of_updates(row, step, "rms")
            sizes.append(size / size[middle])
        right.plot(where, np.concatenate(sizes, axis=1), "o", color=colour, markersize=3)
        right.plot(where, where**power, color=colour, label=f"{step}: c{'²' * (power == 2)}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.axvline(1, color="0.5", linestyle=":")
        axes.set(xlabel="c of φ → c φ, W → W / c")
        axes.legend(fontsize=8, frameon=False)
    left.set(ylabel="representation's share of Δ log π", ylim=(-0.1, 1.1))
    right.set(ylabel="its size, relative to c = 1")
    right.set_yscale("log", base=2)
    models, updates = len(rows), len(rows[0]["gauges"][0]["updates"])
    figure.suptitle(
        f"{name}: {models * updates} updates (dots), {rows[0]['sites']} sites, "
        f"{base_models(models)}; the policy is the same at every c",
        fontsize=9,
    )
    return figure


def find(chosen: Namespace) -> tuple[list[Verdict], list[dict[str, Any]], plt.Figure]:
    """The answer of one model."""
    rows = [of_base(subject, chosen.size) for subject in subjects(chosen)]
    return verdicts(rows), rows, draw(rows, chosen.name)


if __name__ == "__main__":
    frame.keep(parser(__doc__).parse_args(), "gauge", find)
