"""Whose doing is the representation component's small share: Adam's, or the kernel's own?

Claim examined (Tomihari 2026, arXiv 2601.04670): what an update copies from sample to sample goes
through the representation component, ⟨φ, φ'⟩ I. On the story runs its share of the predicted change
is 0.1 to 1.5 %, measured along Adam's updates. Here the pairwise kernels at a checkpoint, between
sites (log π of one token) and between whole completions (what an RL update sums), once of plain
gradients and once in the metric of the checkpoint's own Adam state.

Command:   python experiments/components.py RUN ... [--output experiments/results/components]
           RUN is a directory of `jaxdyn rl` (experiments/stories.py makes nine), untied.
Time:      a minute a run of the 260-thousand-parameter model on two CPU cores.
Expected:  a table, and components.csv: the shares ⟨part, total⟩ / ⟨total, total⟩ of each component
           over the pairs of different samples and over each sample with itself. On six runs the
           representation component has 0.032 to 0.044 of the kernel between different completions,
           0.026 to 0.036 in Adam's metric: small either way. Between single sites 0.08 to 0.15,
           and 0.05 to 0.10.
"""

import argparse
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn import kernels
from jaxdyn.dynamics import sites_from_rollout
from jaxdyn.rollout import step_key
from jaxdyn.train import open_run
from jaxdyn.train.experience import gather_experience
from jaxdyn.types import COMPONENTS, Components

COLUMNS = ("run", "step", "between", "metric", "pairs", "representation", "gradient", "positive")


def shares(kernel: kernels.Kernel, off_diagonal: bool) -> tuple[float, float, float]:
    """Of the representation and the gradient component; and how many entries are positive."""
    keep = np.eye(len(kernel.total), dtype=bool) ^ off_diagonal
    parts = [jnp.asarray(np.asarray(getattr(kernel, name))[keep]) for name in COMPONENTS]
    found = kernels.component_shares(Components(*parts))
    positive = float(np.mean(np.asarray(kernel.total)[keep] > 0))
    return float(found.representation), float(found.gradient), positive


def rows_of(run: Path, num_prompts: int) -> list[tuple]:
    """The table's rows of a run's newest checkpoint."""
    with open_run(run) as saved:
        step, task, state = saved.steps[-1], saved.task, saved.state()
    model, params, optim = task.model, state.params, task.config.optim
    prompts, key = task.test[:num_prompts], step_key(0, "probe", step)
    rollout = gather_experience(task, params, prompts, key, 1).rollout
    adam = kernels.adam_preconditioner(state.opt_state, params, b2=optim.b2, eps=optim.eps)
    sites = sites_from_rollout(rollout, 1, 0)
    found = []
    for metric, preconditioner in (("plain", None), ("Adam", adam)):
        options = {"preconditioner": preconditioner, "method": "gram"}
        between = {
            "sites": kernels.log_prob_kernel(model, params, sites, **options),
            "completions": kernels.sequence_kernel(model, params, rollout, **options),
        }
        for name, kernel in between.items():
            for pairs, off_diagonal in (("different", True), ("itself", False)):
                values = shares(kernel, off_diagonal)
                found.append((run.name, step, name, metric, pairs, *values))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output", default="experiments/results/components", type=Path)
    chosen = parser.parse_args()
    rows = []
    print(f"{'run':<20}{'between':<13}{'metric':<8}{'pairs':<11}{'repr.':>8}{'grad.':>8}{'K>0':>7}")
    for run in chosen.runs:
        for row in rows_of(run, chosen.prompts):
            name, _, between, metric, pairs, representation, gradient, positive = row
            print(
                f"{name:<20}{between:<13}{metric:<8}{pairs:<11}{representation:>8.4f}"
                f"{gradient:>8.4f}{positive:>7.2f}"
            )
            rows.append(row)
        jax.clear_caches()
    chosen.output.mkdir(parents=True, exist_ok=True)
    with (chosen.output / "components.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
