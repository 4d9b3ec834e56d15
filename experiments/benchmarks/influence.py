"""What influence costs beside a kernel of as many rows, and sketched gradients beside bergson's.

Claims (two CPU cores, float32, warm; medians and ratios over interleaved rounds):
  influence  the whole account of an update (momentum, decay, second order) of 64 completions at 64
             sites takes at most twice the log-prob kernel of the sites and one token of every
             completion, 64 × 64 rows in the same metric, at the shape of SmolLM2-135M: 1.97 times
             (results/influence_influence.json) and 1.81 in two runs; a round is six minutes on
             two cores of 490 GFLOP/s.
  peer       gradients of the same completions of the same model, projected to the same dimension:
             at least 1.5 times bergson's completions a second, and inner products closer to the
             exact ones. Ours are of all parameters; bergson's, of the linear layers of the body,
             are held against the exact ones of these. On a model of 260 thousand parameters it is
             1.5 to 1.8 times on two cores of 450 to 490 GFLOP/s (results/influence_peer.json),
             and was, by another side, 1.3 to 1.4 times at 200; on SmolLM2-135M 1.3 and 1.0, as the
             passes through the model are most of both (influence_peer_smollm2_135m.json,
             --count 16 --rounds 3).
Command:   python experiments/benchmarks/influence.py SUITE ... [--model DIRECTORY]
               [--count 64 --prompt 32 --completion 64] --bergson-python bergson/bin/python
           For bergson's environment see peers/bergson_worker.py. On a machine that others use
           too, `OMP_NUM_THREADS=1 taskset -c 0` and a core's seconds.
Time:      an hour on two cores; the peer on a model of 260 thousand parameters, two minutes.
Expected:  tables on the screen, results/influence_SUITE.json. Without --model it is a random model
           of SmolLM2-135M's shape, of which the exact inner products are left out: the gradients
           would not fit.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import interleave
import jax
import jax.numpy as jnp
import ledger
import numpy as np
from peers.protocol import Shape

from jaxdyn.dynamics import contributions, sites_from_rollout
from jaxdyn.dynamics import influence as account
from jaxdyn.dynamics.influence import Change
from jaxdyn.kernels import log_prob_kernel, sketch_kernel, sketch_sequences
from jaxdyn.models import LanguageModel, save_pretrained
from jaxdyn.rollout import generate
from jaxdyn.types import Params, PromptBatch, Rollout, Sites

PER_COMPLETION = 4  # sites
LARGEST = 2**31  # bytes of gradients that the exact inner products may take
SKETCHES = 3  # keys of ours over whose errors the middle is taken


def influence(arguments: argparse.Namespace) -> dict:
    """The account of an update, its matrix alone, and the kernel of as many rows."""
    model, before, after, rollout = ledger.problem(arguments)
    count, length = rollout.completion_ids.shape
    few = jax.tree.map(lambda x: x[: count // PER_COMPLETION], rollout)
    sites = sites_from_rollout(few, PER_COMPLETION - 1, 0)
    metric = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3, x.dtype), before)
    others = {
        "momentum": Change(jax.tree.map(lambda x, y: 0.1 * (y - x), before, after)),
        "decay": Change(jax.tree.map(lambda x: -1e-5 * x, before)),
    }
    weights = np.random.default_rng(1).standard_normal((count, length, 2)) / length
    common = {"weights": weights, "temperature": 1.0, "metric": metric}
    how: Any = {"memory_budget": arguments.memory_budget}
    given = (model, before, sites, one_token_each(rollout))
    cases = {
        "log-prob kernel": lambda: log_prob_kernel(*given, preconditioner=metric, **how),
        "the matrix alone": lambda: contributions(model, before, sites, rollout, **common, **how),
        "influence": lambda: account(
            model, before, after, sites, rollout, **common, others=others, **how
        ),
    }
    for run in cases.values():  # compiles
        jax.block_until_ready(run())
    rounds = [
        {name: harness.clocks(run) for name, run in cases.items()} for _ in range(arguments.rounds)
    ]
    middle = {name: harness.typical(one[name] for one in rounds) for name in cases}
    floor, *accounts = cases
    ratios = {
        name: harness.typical(harness.ratio(one[name], one[floor]) for one in rounds)
        for name in accounts
    }
    rows = f"{len(sites.rows)} sites × {count} completions"
    print(f"\ninfluence: {rows}, {harness.thermometer():.0f} GFLOP/s; in brackets of all cores")
    for name, seconds in middle.items():
        print(f"{name:<20}{seconds['wall']:>9.2f} s ({seconds['cores']:.2f} s)", end="")
        beside = ratios.get(name)
        print(f"   {beside['wall']:.2f} ({beside['cores']:.2f}) × {floor}" if beside else "")
    return {"medians": middle, "ratios": ratios, "rounds": rounds}


def one_token_each(rollout: Rollout) -> Sites:
    """The last token of every completion."""
    count, slots = rollout.tokens.shape
    return Sites(
        tokens=rollout.tokens,
        mask=rollout.mask,
        rows=jnp.arange(count),
        positions=jnp.full(count, slots - 2),
        targets=rollout.completion_ids[:, -1],
        is_prompt=jnp.zeros(count, bool),
    )


def peer(arguments: argparse.Namespace) -> dict:
    """Sketches of the same completions by both, at the peer's dimension, and their products."""
    if not arguments.bergson_python:
        raise SystemExit(
            "bergson: no Python that has it; give --bergson-python PATH (peers/bergson_worker.py "
            "says what it needs)"
        )
    model, params, _, rollout = ledger.problem(arguments)
    rollout = sampled(model, params, rollout)
    count, prompt = rollout.prompt_ids.shape
    # Of M matrices theirs are M p² numbers, and ours at most as many, of whole vector registers.
    matrices, side = 7 * model.config.num_layers, arguments.side
    dimension = matrices * side**2
    sizes: Any = {"replicates": arguments.replicates}
    most = math.isqrt(dimension // arguments.replicates)
    sizes["side"] = most // 8 * 8 or most
    sizes["memory_budget"] = arguments.memory_budget
    keys = [jax.random.key(number) for number in range(SKETCHES)]
    ours = lambda key: sketch_sequences(model, params, rollout, key, **sizes)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(directory, model, params)
        tokens = np.asarray(rollout.tokens)
        labels = np.where(np.arange(tokens.shape[1]) < prompt, -100, tokens)
        given = {"input_ids": tokens.tolist(), "labels": labels.tolist()}
        (Path(directory) / "completions.json").write_text(json.dumps(given))
        script = str(Path(interleave.HERE) / "peers/bergson_worker.py")
        command = {"bergson": [arguments.bergson_python, script, directory, str(side)]}
        rounds = []
        with interleave.started(command, Shape(), "gradients") as (worker,):
            for number in range(-1, arguments.rounds):
                seconds = {"jaxdyn": harness.clocks(lambda: ours(keys[0]).body)}
                theirs = worker.work()
                seconds["bergson"] = {"wall": theirs["gradients"], "cores": theirs["cores"]}
                rounds += [seconds] if number >= 0 else []
            about = worker.about
        theirs = np.load(Path(directory) / "gradients.npy").astype(np.float64)
    if theirs.shape != (count, dimension):
        raise SystemExit(f"bergson: gradients {theirs.shape}, wanted {(count, dimension)}")
    middle = {name: harness.typical(one[name] for one in rounds) for name in rounds[0]}
    ratio = harness.typical(harness.ratio(one["bergson"], one["jaxdyn"]) for one in rounds)
    cores = len(os.sched_getaffinity(0))
    print(f"\npeer: {count} completions, {dimension} numbers each, {cores} cores, ", end="")
    print(f"{harness.thermometer():.0f} GFLOP/s; ours {arguments.replicates} × {sizes['side']}²")
    for name, seconds in middle.items():
        rate, own = (count / seconds[clock] for clock in ("wall", "cores"))
        print(f"{name:<10}{rate:>9.1f} completions a second, {own:.1f} a core's second")
    print("bergson's seconds over ours, the rounds' median: ", end="")
    print(f"{ratio['wall']:.2f}, of the cores {ratio['cores']:.2f}")
    errors = {}
    if count * 4 * sum(x.size for x in jax.tree.leaves(params)) <= LARGEST:
        every, linear = exact_products(model, params, rollout)
        found = [np.asarray(sketch_kernel(ours(key)).total) for key in keys]
        errors = {
            "jaxdyn": statistics.median(error_of(x, every) for x in found),
            "bergson": error_of(theirs @ theirs.T, linear),
        }
        print("error of inner products: " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))
    return {
        "count": count,
        "dimension": dimension,
        "sketch": sizes,
        "about": about,
        "cores": cores,
        "medians": middle,
        "ratios": ratio,
        "errors": errors,
        "rounds": rounds,
    }


def sampled(model: LanguageModel, params: Params, rollout: Rollout) -> Rollout:
    """The prompts' completions as the model itself writes them, none of which ends early."""
    prompts = PromptBatch(rollout.prompt_ids.astype(jnp.int32), rollout.prompt_mask)
    length = rollout.completion_ids.shape[1]
    return generate(
        model,
        params,
        prompts,
        jax.random.key(0),
        num_generations=1,
        max_completion_length=length,
    )


def exact_products(model: LanguageModel, params: Params, rollout: Rollout):
    """⟨∇ log π, ∇ log π'⟩ of completions [B, B], of all parameters and of the body's matrices, by
    whole gradients, in float64 from the gradients on."""
    slots = rollout.prompt_ids.shape[1]

    def score(params, tokens, mask):
        view = model.view(params)
        phi = model.features(view["backbone"], tokens[None], mask[None])[0, slots - 1 : -1]
        log_probs = jax.nn.log_softmax(model.logits(view["classifier"], phi))
        return jnp.sum(jnp.take_along_axis(log_probs, tokens[slots:, None], axis=1))

    each = lambda one: jax.grad(score)(params, *one)
    gradients = jax.jit(lambda: jax.lax.map(each, (rollout.tokens, rollout.mask)))()
    every, linear = 0.0, 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
        rows = np.asarray(x, np.float64).reshape(len(x), -1)
        product = rows @ rows.T
        every += product
        linear += product if path[0].key == "backbone" and path[-1].key == "kernel" else 0
    return every, linear


def error_of(found: np.ndarray, exact: np.ndarray) -> float:
    """The rms of the errors of cosines: of ⟨g_i, g_j⟩ / (‖g_i‖ ‖g_j‖), the norms exact."""
    norms = np.sqrt(np.diag(exact))
    return float(np.sqrt(np.mean(((found - exact) / norms[:, None] / norms[None]) ** 2)))


SUITES = {"influence": influence, "peer": peer}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--model", help="a Hugging Face directory")
    parser.add_argument("--count", type=int, default=64, help="completions, and sites")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--vocab", type=int, default=49152, help="of the random model")
    parser.add_argument("--side", type=int, default=8, help="p: a matrix's gradient is p × p")
    parser.add_argument("--replicates", type=int, default=2, help="of our sketches")
    parser.add_argument("--bergson-python", help="the Python that has bergson")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-budget", type=int, default=4 * 2**30)
    parser.add_argument("--toy", action="store_true", help="a shape for the tests")
    harness.add_output(parser)
    given = parser.parse_args(sys.argv[1:])
    given.after = None
    given.shape = (8, 3, 4) if given.toy else (given.count, given.prompt, given.completion)
    for suite in harness.known(given.suites, SUITES):
        name = f"influence_{suite}" + ("_toy" if given.toy else "")
        content = {"shape": given.shape, "model": bool(given.model), **SUITES[suite](given)}
        harness.write(given.output, name, content)


if __name__ == "__main__":
    main()
