"""Padding of an RL update whose completions end early, and what it costs.

Claim:     on the stories task less than 10 % of an update's slots are padding, where a trained
           model's completions padded to the longest leave more; the update is the faster for it.
Command:   jaxdyn rl --preset stories260k --model.path DIRECTORY --output RUN
           python experiments/benchmarks/lengths.py RUN
Time:      two minutes on two CPU cores, after the run's.
Expected:  a line for the model before training and one for the run's newest checkpoint: the slots'
           padding, padded and packed, and the update's seconds; results/lengths.json.

Both updates are of the same batches, one after another, by the process's seconds and the clock's.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import sharing

WAYS = ("padded", "packed")


def measure(task: Any, params: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """Of a few batches that a policy samples: padding and seconds either way, and the lengths."""
    import jax
    import numpy as np

    from jaxdyn.optim import OptimConfig
    from jaxdyn.rollout import step_key, trim
    from jaxdyn.train import UpdateBatch, fresh_state, update
    from jaxdyn.train.experience import examples_of, gather_experience
    from jaxdyn.train.sharing import sequences_of

    config, optim = task.config, OptimConfig(learning_rate=1e-6)
    parts = config.train.microbatches
    found: dict[str, Any] = {"lengths": []}
    found |= {way: {"padding": [], "seconds": [], "process_seconds": []} for way in WAYS}
    for step in range(chosen.batches):
        key = step_key(config.seed, "rollout", step)
        given = examples_of(task, step), key, config.train.num_generations
        experience = gather_experience(task, params, *given)
        rollout = trim(experience.rollout)
        found["lengths"].append(np.asarray(rollout.completion_mask).sum(axis=1).tolist())
        advantages = jax.random.normal(key, (len(rollout.completion_ids),))
        for way in WAYS:
            with sharing.packed_gain(math.inf if way == "padded" else 1.1):
                rows = sequences_of(rollout, config.train.num_generations, parts)
            tokens = np.asarray(rollout.completion_mask).sum()
            tokens += np.asarray(rollout.prompt_mask[:: config.train.num_generations]).sum()
            found[way]["padding"].append(1 - float(tokens) / rows.tokens.size)
            static = {"model": task.model, "optim": optim, "loss": config.loss}
            batch = UpdateBatch(**vars(rows), advantages=advantages, ref_per_token_logps=None)
            for number in range(-1, chosen.rounds):
                state = fresh_state(task.model, params, optim, "joint")
                take = lambda s=state, b=batch, o=static: update(
                    s, {}, b, None, np.float32(1e-6), np.float32(1), **o, microbatches=parts
                )
                began = time.process_time()
                seconds = harness.timed(take)[0]
                if number >= 0:
                    found[way]["seconds"].append(seconds)
                    found[way]["process_seconds"].append(time.process_time() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="a directory of jaxdyn rl")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    harness.add_output(parser)
    chosen = parser.parse_args()

    import dataclasses

    from jaxdyn.train import open_run

    with open_run(chosen.run) as run:
        task = run.task
        free = dataclasses.replace(task.config.loss, beta=0.0)
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, loss=free))
        policies = {"before": task.params, "after": run.policy(merged=False)[1]}
        found = {name: measure(task, params, chosen) for name, params in policies.items()}
    print(f"{'':<8}{'tokens':>8}{'padding, padded':>17}{'packed':>8}{'s':>8}{'s':>8}{'ratio':>7}")
    for name, case in found.items():
        mean = statistics.mean(x for lengths in case["lengths"] for x in lengths)
        shares = [statistics.mean(case[way]["padding"]) for way in WAYS]
        seconds = [statistics.median(case[way]["process_seconds"]) for way in WAYS]
        print(f"{name:<8}{mean:>8.1f}{shares[0]:>17.3f}{shares[1]:>8.3f}", end="")
        print(f"{seconds[0]:>8.3f}{seconds[1]:>8.3f}{seconds[0] / seconds[1]:>7.2f}")
    path = harness.write(Path(chosen.output), "lengths", json.loads(json.dumps(found)))
    print(f"-> {path}")


if __name__ == "__main__":
    main()
