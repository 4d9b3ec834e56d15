"""What device.py times on a card: a run's programs, whole steps, kernels, a ledger."""

import argparse
import dataclasses
import functools
import statistics
from typing import Any

import engine
import harness
import jax
import jax.numpy as jnp
import ledger as ledger_benchmark
import numpy as np
import roofline
from kernel_cases import Shape as KernelShape
from kernels import operations
from peers.protocol import END, Shape
from rollout import bytes_of_decoding

from jaxdyn import kernels
from jaxdyn.data import encode_prompts
from jaxdyn.optim import Stage
from jaxdyn.rollout import generate, step_key
from jaxdyn.rollout.generate import cache_sizes
from jaxdyn.train.policy import policy_logps
from jaxdyn.train.step import take_step
from jaxdyn.types import Sites

NEOX = "gpt_neox"
STAGES = {"stage 1": "classifier", "stage 2": "joint"}


def updates(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """The reference's log-probs and both stages' updates: shares of the rates, and peak memory."""
    rates = roofline.rates_of(shape.dtype)
    problem = engine.Problem(shape, NEOX, chosen.remat, chosen.microbatches)
    task, batch = problem.task, problem.update("classifier")[1][2]
    reference = jax.jit(lambda params, batch: policy_logps(task.model, params, batch, 1.0))
    options = {"rates": rates, "rounds": chosen.rounds}
    found = [roofline.program("reference", reference, (task.params, batch), **options)]
    needed = {"joint": engine.model_flops(shape, NEOX), "classifier": 0.0}
    for name, stage in STAGES.items():  # the larger one last: a peak is that of the process
        found.append(
            roofline.program(
                f"{name} update",
                *problem.update(stage),
                **options,
                carried=True,
                flops=needed[stage],
            )
        )
    roofline.table("updates", found)
    share = found[-1]["shares"]["compute"]
    print(f"stage 2: {share:.1%} of the matrix rate, by the flops that it needs")
    return {"rates": dataclasses.asdict(rates), "rows": found}


def decoding(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Prefill and whole rollouts; decoding beside the weights and caches that it has to read."""
    rates = roofline.rates_of(shape.dtype)
    task = engine.task_of(shape, NEOX)
    model, params = task.model, task.params
    texts = [example["prompt"] for example in task.train[: shape.prompts]]
    prompts = encode_prompts(task.tokenizer, texts, shape.prompt_length)
    draw = functools.partial(
        generate,
        model,
        num_generations=shape.generations,
        max_completion_length=shape.completion_length,
        stop_ids=(END,),
    )
    options = {"rates": rates, "rounds": chosen.rounds}
    prefill = jax.jit(lambda params, prompts: model.prefill(params, *prompts))
    ids = prompts.prompt_ids, prompts.prompt_mask
    found = [
        roofline.program("prefill", prefill, (params["backbone"], ids), **options),
        roofline.program(
            "rollout",
            jax.jit(lambda params, prompts, key: draw(params, prompts, key)),
            (params, prompts, step_key(0, "rollout", 0)),
            trips=cache_sizes(shape.completion_length)[0],
            **options,
        ),
    ]
    first, whole = (row["median_seconds"] for row in found)
    nbytes = bytes_of_decoding(shape, sum(x.size for x in jax.tree.leaves(params)))
    decoded = max(whole - first, 1e-9)
    found.append(roofline.row("decoding", [decoded], rates, nbytes=nbytes))
    roofline.table("decoding", found)
    tokens = shape.rows * shape.completion_length / whole
    share = found[-1]["shares"]["bandwidth"]
    print(f"{tokens:.0f} tokens/s; decoding at {share:.1%} of the bandwidth floor")
    return {
        "rates": dataclasses.asdict(rates),
        "rows": found,
        "tokens_per_second": tokens,
        "share_of_bandwidth_floor": share,
    }


def steps(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Whole RL steps of either stage, and where their time goes."""
    options = {"remat": chosen.remat, "microbatches": chosen.microbatches}
    task = engine.task_of(shape, NEOX, **options)
    found = {}
    names = ("time/rollout", "time/reward", "time/reference", "time/update", "step_time")
    print(f"\nsteps\n{'':<10}" + "".join(f"{name:>16}" for name in names) + f"{'tokens/s':>10}")
    for name, kind in STAGES.items():
        state, stage = engine.state_of(task, kind), Stage(kind, 0, 10**6)
        taken = []
        for number in range(1 + chosen.rounds):  # the first compiles
            state, metrics, *_ = take_step(task, state, stage, number)
            taken += [{key: metrics[key] for key in names}] if number else []
        middle = {key: statistics.median(step[key] for step in taken) for key in names}
        rate = shape.rows * shape.completion_length / middle["step_time"]
        del state
        print(f"{name:<10}" + "".join(f"{middle[key]:>16.4f}" for key in names) + f"{rate:>10.0f}")
        found[name] = {"steps": taken, "medians": middle, "tokens_per_second": rate}
    return {"stages": found, "peak_bytes": roofline.allocated().get("peak_bytes_in_use")}


# -- kernels ----------------------------------------------------------------------------------


def kernel_operations(shape: KernelShape, probes: int, replicates: int, side: int) -> dict:
    """Flops by quantity. A pass is 2 N T products of every matrix; the log-prob kernel's are those
    of `kernels.operations`, of which each probe takes the backward pass and the pairs again."""
    matrices = 12 * shape.width**2 * shape.layers
    one_pass = 2 * shape.sites * shape.slots * matrices
    whole = operations(shape)
    entries = 14 * shape.width * shape.layers  # I + O, over a layer's four matrices
    project = 4 * shape.sites * shape.slots * replicates * side * entries
    return {
        "log-prob": whole,
        "trace by probes": one_pass + probes * (whole - one_pass),
        "sketch": 2 * one_pass + project,
    }


def kernel_suite(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Log-prob kernel, trace by probes and sketches of N sites, each in a sequence of its own."""
    rates = roofline.rates_of(shape.dtype)
    count, slots, probes, replicates, side = chosen.sites, shape.prompt_length, 16, 64, 8
    model = engine.model_of(shape, NEOX)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.integers(0, shape.vocab, size), jnp.int32)
    sites = Sites(
        tokens=draw(count, slots),
        mask=jnp.ones((count, slots), bool),
        rows=jnp.arange(count, dtype=jnp.int32),
        positions=jnp.full(count, slots - 1, jnp.int32),
        targets=draw(count),
        is_prompt=jnp.ones(count, bool),
    )
    key, given = jax.random.key(0), (model, params, sites)
    free = roofline.allocated()
    budget = 8 * 2**30
    if free:  # half of what is left: what fragments, and what the budget does not count
        budget = (free["bytes_limit"] - free["bytes_in_use"]) // 2
    within = {"memory_budget": budget}
    runs = {
        "log-prob": lambda: kernels.log_prob_kernel(*given, method="gram", **within).total,
        "trace by probes": lambda: (
            kernels.trace_kernel(*given, num_probes=probes, key=key, **within).total
        ),
        "sketch": lambda: (
            kernels.sketch_gradients(*given, key, replicates=replicates, side=side, **within).body
        ),
    }
    sizes = KernelShape(shape.layers, shape.width, shape.vocab, count, slots)
    flops = kernel_operations(sizes, probes, replicates, side)
    found = []
    for name, run in runs.items():
        first = harness.timed(run)[0]
        seconds = [harness.timed(run)[0] for _ in range(min(chosen.rounds, 3))]
        row = roofline.row(name, seconds, rates, flops=flops[name])
        found.append({**row, "first_seconds": first})
    roofline.table(f"kernels of {count} sites after {slots} tokens", found)
    return {"rates": dataclasses.asdict(rates), "sites": count, "slots": slots, "rows": found}


def ledger(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """A node and a whole ledger at the shape of SmolLM2-135M, in float32, beside bare passes."""
    toy = shape.width < 64
    given = argparse.Namespace(
        model=None, after=None, toy=toy, rounds=chosen.rounds, memory_budget=4 * 2**30
    )
    given.shape = (2, 3, 4) if toy else (16, 32, 64)
    return {
        "shape_of_texts": given.shape,
        "nodes": ledger_benchmark.nodes(given),
        "whole": ledger_benchmark.whole(given),
    }
