"""What an RL step costs: beside its peers, by stage of CF-RL, with telemetry, in memory.

Claims (two CPU cores, float32, the default shape: 4 layers, width 256, feed-forward 1024, 8 heads,
V 2048, untied, 2 prompts × 8 generations, 16 + 64 tokens, β 0.04 with a reference, AdamW):
  peers      a whole step 2.2 times as fast as Tunix's and twice as TRL's (cores of 500 GFLOP/s; at
             200 twice and 1.8 times); the generation and the update each faster than a bare JAX
             program's (peers/floor.py). With 256 + 64 tokens ten times as Tunix's and three times
             as TRL's, as on SmolLM2-135M.
  stages     the classifier stage's update at least 5 times cheaper than the joint one, in time and
             flops, and 3 times lighter in peak memory; harvested features agree with a full pass.
  telemetry  propagation on 64 probe sites every 10 steps takes under 10 % of the run.
  compile    nothing compiles after the first step of each kind; seconds from the start of the
             process to its first step, with JAX's persistent compilation cache empty and full.
  memory     the update's peak by dtype, remat policy and micro-batches.
  sharing    the update and its log-probs with a prompt passed once and once a completion, at least
             2.5 times faster with 256 + 64 or 512 + 128 tokens (--shape prompt-256, prompt-512).
  rate       the update's share of the device's matrix product rate (45 % on an accelerator).
Command:   python experiments/benchmarks/rl_step.py SUITE ... (all of them without one)
               --tunix-python tunix/bin/python --trl-python trl/bin/python --rounds 15
           A checkpoint's weights: --shape smollm2-135m --model DIRECTORY --without tunix, with
           --trl-microbatches 4 where its whole batch needs more memory than there is.
           A peer without a Python ends it; `--without tunix trl` says that they are left out.
           Any shape: --shape pythia-410m, --layers 8, ...; see --help. The peers live in
           environments of their own:
               python3.11 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
               python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
Time:      about ten minutes on two quiet CPU cores.
Expected:  tables on the screen, results/rl_step_SUITE.json.

Seconds of "generate" are those of the rollout as a step has it, texts and tokens included;
rollout.py times generation alone.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import compilation
import harness
import interleave
import sharing
from peers.protocol import Shape, add_shape_arguments, name_of, shape_from


def peers(shape: Shape, chosen: argparse.Namespace) -> dict:
    """Whole steps of every framework, interleaved."""
    found = interleave.interleaved(shape, "step", chosen)
    interleave.report(found, ["step", "generate", "reference", "update"])
    return found


def stages(shape: Shape, chosen: argparse.Namespace) -> dict:
    """The classifier stage's update against the joint one, and the features it lives on."""
    import engine

    problem = engine.Problem(shape, chosen.architecture, chosen.remat, chosen.microbatches)
    updates = {name: problem.update(name) for name in ("joint", "classifier")}
    costs = {name: engine.cost_of(*update) for name, update in updates.items()}
    runs = {f"{name} update": engine.updater(*update) for name, update in updates.items()}
    runs |= {f"{name} step": problem.steps(name) for name in updates}
    seconds = {name: [] for name in runs}
    gflops = []
    for number in range(-chosen.warm_up, chosen.rounds):
        heat = harness.thermometer()
        for name, run in runs.items():
            taken = harness.timed(run)[0]
            if number >= 0:
                seconds[name].append(taken)
        gflops += [heat] if number >= 0 else []
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\nstages: {json.dumps(dataclasses.asdict(shape))}")
    print(f"{'':<16}{'update s':>10}{'step s':>9}{'Gflop':>9}{'products':>10}{'peak MiB':>10}")
    for name, cost in costs.items():
        print(
            f"{name:<16}{middle[f'{name} update']:>10.4f}{middle[f'{name} step']:>9.4f}"
            f"{cost.flops / 1e9:>9.2f}{cost.product_flops / 1e9:>10.2f}"
            f"{harness.mebibytes(cost.peak_bytes):>10}"
        )
    pairs = zip(seconds["joint update"], seconds["classifier update"], strict=True)
    ratios = {
        "update_seconds": middle["joint update"] / middle["classifier update"],
        "update_seconds_by_round": statistics.median(a / b for a, b in pairs),
        "step_seconds": middle["joint step"] / middle["classifier step"],
        "flops": costs["joint"].flops / costs["classifier"].flops,
        "product_flops": costs["joint"].product_flops / costs["classifier"].product_flops,
        "peak_bytes": costs["joint"].peak_bytes / costs["classifier"].peak_bytes,
    }
    agreement = harvest_agreement(problem)
    print("joint / classifier: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    print("harvested features: " + ", ".join(f"{k} {v:.3g}" for k, v in agreement.items()))
    return {
        "shape": dataclasses.asdict(shape),
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "seconds": seconds,
        "medians": middle,
        "gflops": gflops,
        "ratios": ratios,
        "harvest": agreement,
    }


def harvest_agreement(problem: Any) -> dict[str, float]:
    """Largest difference of harvested features from a teacher-forced pass's, beside their size."""
    import jax.numpy as jnp

    from jaxdyn.train.sharing import batch_features

    task, rollout = problem.task, problem.experience.rollout
    again = batch_features(task.model, task.params["backbone"], rollout)
    of_tokens = lambda x: jnp.where(rollout.completion_mask[..., None], x, 0)
    features = of_tokens(again).astype(jnp.float32)
    gap = jnp.abs(of_tokens(rollout.features).astype(jnp.float32) - features)
    return {
        "largest_difference": float(gap.max()),
        "largest_feature": float(jnp.abs(features).max()),
    }


LAYOUTS = ((32, 1), (16, 3))  # prompts, and sites in a completion beside its first


def telemetry(shape: Shape, chosen: argparse.Namespace) -> dict:
    """Steps as a run takes them, one in ten of them probed at 64 sites, files included."""
    import engine

    problem = engine.Problem(shape, chosen.architecture, chosen.remat, chosen.microbatches)
    print(f"\ntelemetry: {json.dumps(dataclasses.asdict(shape))}")
    print(f"{'prompts':>8}{'sites':>7}{'probe s':>10}{'step s':>9}{'of the run':>12}{'start s':>9}")
    layouts = []
    for num_prompts, inside in LAYOUTS:
        found = probed_run(problem, num_prompts, inside, chosen.rounds, chosen.warm_up)
        layouts.append(found)
        print(
            f"{num_prompts:>8}{found['sites']:>7}{found['median_probe_seconds']:>10.4f}"
            f"{found['median_step_seconds']:>9.4f}{found['overhead']:>12.1%}"
            f"{found['start_seconds']:>9.1f}"
        )
    return {"shape": dataclasses.asdict(shape), "layouts": layouts}


def probed_run(problem: Any, num_prompts: int, inside: int, rounds: int, warm_up: int) -> dict:
    """Seconds of steps and of probes at a completion's first site and `inside` it."""
    import jax

    from jaxdyn.dynamics import ProbeConfig
    from jaxdyn.train.probe import Probe, remember
    from jaxdyn.train.run_directory import RunDirectory

    every = 10
    layout = ProbeConfig(every=every, num_prompts=num_prompts, sites_per_completion=inside)
    task = problem.task.told(probe=layout)
    step = problem.steps("joint")
    start_seconds, probe = harness.timed(lambda: Probe(task))
    steps, probes = [], []
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory(Path(directory) / "run", task.config)
        state = step()
        for number in range((warm_up + rounds) * every):
            due = probe.due(number)
            began = time.perf_counter()
            before = jax.block_until_ready(remember(state)) if due else None
            remembered = time.perf_counter()
            state = step()
            stepped = time.perf_counter()
            if due:
                scalars, arrays = probe.measure(before, state)
                run.log("dynamics.jsonl", {"step": number, "cfrl/stage": 2, **scalars})
                run.save_arrays(number, arrays)
            ended = time.perf_counter()
            if number >= warm_up * every:
                steps.append(stepped - remembered)
                probes += [remembered - began + ended - stepped] if due else []
        run.close()
    step_seconds, probe_seconds = statistics.median(steps), statistics.median(probes)
    return {
        "prompts": num_prompts,
        "sites": len(probe.sites.targets),
        "every": every,
        "start_seconds": start_seconds,
        "median_step_seconds": step_seconds,
        "median_probe_seconds": probe_seconds,
        "overhead": probe_seconds / (every * step_seconds),
        "step_seconds": steps,
        "probe_seconds": probes,
        "gflops": harness.thermometer(),
    }


VARIANTS = tuple(itertools.product(("float32", "bfloat16"), ("none", "dots", "full"), (1, 4)))


def memory(shape: Shape, chosen: argparse.Namespace) -> dict:
    """The joint update's peak by the compiler's account, nothing run."""
    import engine

    found = []
    print(f"\nmemory: {json.dumps(dataclasses.asdict(shape))}")
    print(f"{'dtype':<10}{'remat':<7}{'micro':>6}{'peak MiB':>10}{'temp MiB':>10}{'Gflop':>9}")
    for dtype, remat, microbatches in VARIANTS:
        shaped = dataclasses.replace(shape, dtype=dtype)
        cost = engine.joint_update_cost(shaped, chosen.architecture, remat, microbatches)
        case = {"dtype": dtype, "remat": remat, "microbatches": microbatches}
        found.append(case | dataclasses.asdict(cost))
        print(
            f"{dtype:<10}{remat:<7}{microbatches:>6}{harness.mebibytes(cost.peak_bytes):>10}"
            f"{harness.mebibytes(cost.temporary_bytes):>10}{cost.flops / 1e9:>9.1f}",
            flush=True,
        )
    return {"shape": dataclasses.asdict(shape), "cases": found}


def rate(shape: Shape, chosen: argparse.Namespace) -> dict:
    """Flops of the model's products a second, as a share of a large matrix product's."""
    import engine

    problem = engine.Problem(shape, chosen.architecture, chosen.remat, chosen.microbatches)
    run = engine.updater(*problem.update("joint"))
    flops = engine.joint_update_cost(shape, chosen.architecture, "none", 1).product_flops
    seconds, rates = [], []
    for number in range(-chosen.warm_up, chosen.rounds):
        matrix, taken = harness.matrix_rate(shape.dtype), harness.timed(run)[0]
        if number >= 0:
            seconds.append(taken)
            rates.append(matrix)
    share = statistics.median(flops / s / r for s, r in zip(seconds, rates, strict=True))
    print(f"\nrate: an update of {flops / 1e9:.1f} Gflop in {statistics.median(seconds):.4f} s;")
    print(f"{share:.1%} of the {statistics.median(rates) / 1e9:.0f} Gflop/s of a matrix product")
    return {
        "shape": dataclasses.asdict(shape),
        "remat": chosen.remat,
        "microbatches": chosen.microbatches,
        "model_flops": flops,
        "seconds": seconds,
        "matrix_flops_per_second": rates,
        "share": share,
    }


SUITES = {
    "peers": peers,
    "stages": stages,
    "telemetry": telemetry,
    "compile": compilation.suite,
    "memory": memory,
    "sharing": sharing.suite,
    "rate": rate,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", help=", ".join(SUITES))
    parser.add_argument("--architecture", default="llama", choices=interleave.ARCHITECTURES)
    parser.add_argument("--remat", default="dots", choices=("none", "dots", "full"))
    parser.add_argument("--microbatches", type=int, default=1)
    add_shape_arguments(parser)
    interleave.add_peer_arguments(parser)
    harness.add_output(parser)
    chosen = parser.parse_args()
    shape, suites = shape_from(chosen), harness.known(chosen.suites, SUITES)
    if "peers" in suites:
        interleave.frameworks(chosen)  # ends here, not after an hour, where one is missing
    for name in suites:
        found = SUITES[name](shape, chosen)
        print(f"-> {harness.write(chosen.output, f'rl_step_{name}{name_of(shape)}', found)}")


if __name__ == "__main__":
    main()
