"""What a ledger costs, beside the bare passes that no account can do without.

Claims (two CPU cores, float32, warm; medians and ratios over interleaved rounds):
  nodes   a node by component takes at most 3 forward passes; layers × kinds of a batch of
          completions at most 1.3 × (forward + backward pass with gradients).
  whole   `jaxdyn ledger` of a training of SmolLM2-135M: 16 completions of up to 64 tokens that the
          model before wrote to --prompts, layers and kinds of log π and entropy, closes to its
          tolerance (1e-4) within five minutes.
  memory  the same, with layers × kinds, takes at most three copies of the parameters and a forward
          and backward pass of one of its batches, by processes' peaks beyond one's that only
          imports.
  telemetry  what a run's own ledger adds to RL steps, at the default probe, is under 10 %
          (rl_step.py's small shape: 4 layers, width 256, V 2048, 16 completions of 64 tokens).
Command:  python experiments/benchmarks/ledger.py SUITE ... [--model DIRECTORY] [--after DIRECTORY]
          whole wants both and --prompts FILE [--prompt-template none], and takes runs too.
Time:     twenty minutes on two cores.
Expected: tables on the screen, results/ledger_SUITE.json. Without --model it is a random model of
          SmolLM2-135M's shape, and without --after its parameters moved by 1e-3 of their size: for
          costs alone, since what that changes of entropy is near the passes' own rounding (1e-5
          nats), so that no account of it could be told to close. telemetry has a model of its own.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from peers.protocol import SHAPES

from jaxdyn.commands import ledger as command
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.data import character_tokenizer
from jaxdyn.dynamics import ProbeConfig, ledger, sites_from_rollout
from jaxdyn.dynamics.ledger_path import (
    Batch,
    Request,
    batches_of_texts,
    less,
    look,
    node,
    text_node,
)
from jaxdyn.dynamics.observables import SMOOTH
from jaxdyn.models import LanguageModel, llama, load_pretrained, save_pretrained
from jaxdyn.types import Rollout, Sites, View

SMOLLM2 = llama(
    vocab_size=49152,
    width=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_width=1536,
    max_positions=8192,
    tied=True,
    norm_eps=1e-5,
    rotary_base=100000.0,
)
TOY = llama(vocab_size=40, width=16, num_layers=2, num_heads=2, mlp_width=24, max_positions=64)


def start_of(arguments: argparse.Namespace) -> tuple[LanguageModel, Any]:
    """A model and its parameters."""
    if arguments.model:
        return load_pretrained(arguments.model)
    sizes = {"num_layers": arguments.layers, "vocab_size": arguments.vocab}
    model = LanguageModel(TOY if arguments.toy else dataclasses.replace(SMOLLM2, **sizes))
    return model, model.init(jax.random.key(0))


def problem(arguments: argparse.Namespace) -> tuple[LanguageModel, Any, Any, Rollout]:
    """A model, its parameters before and after, and some completions."""
    model, before = start_of(arguments)
    if arguments.after:
        other, after = load_pretrained(arguments.after)
        if model.config.tied and not other.config.tied:  # as runs that untie it leave it
            model, before = model.untie(before)
    else:
        rng = np.random.default_rng(1)  # no program, whose making memory's peak would have

        def near(x):
            noise = rng.standard_normal(x.shape, np.float32)
            return jnp.asarray(np.asarray(x) + 1e-3 * np.std(x) * noise)

        after = jax.tree.map(near, before)
    return model, before, after, completions(model, *arguments.shape)


def one_by_one(trees: list[Any]) -> Iterator[Any]:
    """Each once, none of them kept here."""
    while trees:
        yield trees.pop(0)


def completions(model: LanguageModel, count: int, prompt: int, completion: int) -> Rollout:
    """Random tokens, none of them padding."""
    rng = np.random.default_rng(0)
    ids = lambda slots: jnp.asarray(rng.integers(0, model.config.vocab_size, (count, slots)))
    return Rollout(
        prompt_ids=ids(prompt),
        prompt_mask=jnp.ones((count, prompt), bool),
        completion_ids=ids(completion),
        completion_mask=jnp.ones((count, completion), bool),
        per_token_logps=jnp.zeros((count, completion), jnp.float32),
    )


def every_token(rollout: Rollout) -> Sites:
    return sites_from_rollout(rollout, rollout.completion_ids.shape[1], 0)


def batches(model: LanguageModel, sites: Sites, budget: int) -> list[Batch]:
    return batches_of_texts(model, sites, np.zeros((len(sites.rows), 0), np.int32), budget, False)


def scorer(model: LanguageModel, batch: Batch) -> Callable[[View], jax.Array]:
    """Σ log π of a batch's tokens, from a view: the bare pass."""
    own = Sites(**jax.tree.map(jnp.asarray, batch.sites))

    def score(view):
        phi = model.features(view["backbone"], own.tokens, own.mask)[own.rows, own.positions]
        log_probs = jax.nn.log_softmax(model.logits(view["classifier"], phi))
        return jnp.sum(jnp.take_along_axis(log_probs, own.targets[:, None], axis=1))

    return score


def nodes(arguments: argparse.Namespace) -> dict:
    """One node of each kind beside the bare passes, of one batch."""
    model, before, after, rollout = problem(arguments)
    sites = every_token(rollout)
    change = less(after, before)
    del after
    view = model.view(before)
    head = view["classifier"]
    (batch,) = batches(model, sites, 2**40)
    start = look(model, before, head, batch).phi
    line, given = (before, change), (head, batch.sites, batch.token_ids, start)
    score, by_layer = scorer(model, batch), Request("parameters", ("log_prob",))
    cases = {
        "forward": lambda: forward(view),
        "forward and backward": lambda: backward(view),
        "components": lambda: node(model, Request("parameters"), *line, *given),
        "layers × kinds": lambda: text_node(model, by_layer, *line, 0.0, *given, batch.real),
    }
    forward, backward = jax.jit(score), jax.jit(jax.grad(score))
    for run in cases.values():  # compiles
        jax.block_until_ready(run())
    rounds = [
        {name: harness.clocks(run) for name, run in cases.items()} for _ in range(arguments.rounds)
    ]
    floors = {"components": "forward", "layers × kinds": "forward and backward"}
    medians = {name: harness.typical(one[name] for one in rounds) for name in cases}
    ratios = {
        name: harness.typical(harness.ratio(one[name], one[floor]) for one in rounds)
        for name, floor in floors.items()
    }
    print(f"\nnodes: {len(sites.rows)} sites, {harness.thermometer():.0f} GFLOP/s; ")
    print("in brackets of all cores")
    for name, seconds in medians.items():
        print(f"{name:<24}{seconds['wall']:>9.3f} s ({seconds['cores']:.3f} s)", end="")
        found = ratios.get(name)
        line = f"   {found['wall']:.2f} ({found['cores']:.2f}) × {floors[name]}" if found else ""
        print(line)
    return {"medians": medians, "ratios": ratios, "rounds": rounds}


def whole(arguments: argparse.Namespace) -> dict:
    """The command from beginning to end, sampling and compilation included."""
    with tempfile.TemporaryDirectory() as directory:
        given = toy_training(Path(directory)) if arguments.toy else training(arguments)
        options = LedgerOptions(**given, sample="first", output=f"{directory}/ledger")
        seconds, path = harness.timed(lambda: command.run(options))
        found = json.loads(path.with_suffix(".json").read_text())
    residual = {name: found["quantities"][name]["residual"] for name in SMOOTH}
    count, rate = found["nodes"], harness.thermometer()
    print(f"\nwhole: {seconds:.0f} s, {count} nodes, {rate:.0f} GFLOP/s; residuals ", end="")
    print(json.dumps(residual))
    sizes = {name: found[name] for name in ("texts", "sites", "nodes")}
    return {"seconds": seconds, **sizes, "residual": residual}


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command is told of a real one."""
    if not (arguments.model and arguments.after and arguments.prompts):
        raise SystemExit("whole: a ledger of a training wants --model, --after and --prompts")
    return {
        "checkpoints": (arguments.model, arguments.after),
        "prompts": arguments.prompts,
        "prompt_template": arguments.prompt_template,
        "memory_budget": str(arguments.memory_budget),
    }


def toy_training(directory: Path) -> dict[str, Any]:
    """The same of a few parameters, written there."""
    model, names = LanguageModel(TOY), (str(directory / "before"), str(directory / "after"))
    for number, name in enumerate(names):
        save_pretrained(name, model, model.init(jax.random.key(number)))
        character_tokenizer("abcdefgh").save(name)
    prompts = directory / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "h"}\n')
    return {"checkpoints": names, "prompts": str(prompts), "max_completion_length": 4}


def memory(arguments: argparse.Namespace) -> dict:
    """Peaks of three processes: one only imports, one makes a bare pass, one a ledger."""
    words = [word for word in sys.argv[1:] if word not in SUITES]
    started = lambda case: [__file__, "memory", *words, "--case", case]
    found = {case: harness.in_a_process(case, started(case), timeout=7200.0) for case in CASES}
    stored = found["pass"]["check"]
    beyond = {case: x["peak_bytes"] - found["nothing"]["peak_bytes"] for case, x in found.items()}
    # The bare pass holds the parameters and gives their gradient.
    of_pass = max(0, beyond["pass"] - 2 * stored)
    copies = (beyond["ledger"] - of_pass) / stored
    sizes = ", ".join(
        f"{name} {harness.mebibytes(x)} MiB"
        for name, x in (("parameters", stored), ("a pass", of_pass), ("ledger", beyond["ledger"]))
    )
    print(f"\nmemory: {sizes}: a pass and {copies:.2f} copies of the parameters")
    return {"parameters": stored, "pass": of_pass, "ledger": beyond["ledger"], "copies": copies}


def nothing(arguments: argparse.Namespace) -> int:
    """What all the cases have: the libraries, and a compiled program."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(1)))
    return 0


def bare_pass(arguments: argparse.Namespace) -> int:
    """Forward and backward through the first of the ledger's batches; bytes of the parameters."""
    model, params = start_of(arguments)
    sites = every_token(completions(model, *arguments.shape))
    batch, *_ = batches(model, sites, arguments.memory_budget)
    jax.block_until_ready(jax.jit(jax.grad(scorer(model, batch)))(model.view(params)))
    return sum(x.nbytes for x in jax.tree.leaves(params))


def whole_ledger(arguments: argparse.Namespace) -> int:
    """With layers × kinds, of parameters that it alone holds."""
    model, before, after, rollout = problem(arguments)
    two = one_by_one([before, after])
    del before, after
    by_layer = {"by_layer": ("log_prob",), "memory_budget": arguments.memory_budget}
    return int(ledger(model, two, every_token(rollout), **by_layer).nodes.max())


CASES = {"nothing": nothing, "pass": bare_pass, "ledger": whole_ledger}


def telemetry(arguments: argparse.Namespace) -> dict:
    """Ten steps and a probe, with the run's ledger and without, as the training loop has them."""
    import engine

    from jaxdyn.train.probe import Probe, RunLedger, remember
    from jaxdyn.train.run_directory import RunDirectory

    shape = SHAPES["toy" if arguments.toy else "small"]
    setting = engine.Problem(shape, "llama", "dots", 1)
    config = ProbeConfig(num_prompts=3, every=2) if arguments.toy else ProbeConfig()
    task, step = setting.task.told(probe=config), setting.steps("joint")
    probe, state = Probe(task), step()
    account = RunLedger(probe, state.params, 0, [])
    own: list[float] = []

    def window(run: RunDirectory, number: int, accounted: bool) -> None:
        nonlocal state
        for _ in range(config.every - 1):
            state = step()
        before = remember(state)
        state = step()
        after = probe.look(state.params)
        scalars, arrays = probe.measure(before, state, after)
        if accounted:
            began = time.perf_counter()
            run.log("ledger.jsonl", account.close(state.params, number + 1, after))
            scalars |= account.totals()
            own.append(time.perf_counter() - began)
        run.log("dynamics.jsonl", {"step": number, **scalars})
        run.save_arrays(number, arrays)

    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory(Path(directory) / "run", task.config)
        for number in range(-2, 2 * arguments.rounds, 2):
            one = lambda at, number=number: lambda: window(run, number + at, at == 1)
            seconds = {
                name: harness.timed(one(at))[0] for at, name in enumerate(("without", "with"))
            }
            rounds += [seconds] if number >= 0 else []
        run.close()
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    added = statistics.median(one["with"] / one["without"] for one in rounds) - 1
    share = statistics.median(own[1:]) / middle["without"]
    print(f"\ntelemetry: {len(probe.sites.targets)} sites, every {config.every} steps")
    print(
        f"a window {middle['without']:.3f} s, with the ledger {middle['with']:.3f} s: {added:+.1%}"
    )
    print(f"of it the ledger's own {statistics.median(own[1:]):.4f} s: {share:.2%}")
    return {"medians": middle, "added": added, "own": own[1:], "share": share, "rounds": rounds}


# Processes inherit their parent's peak: memory comes first, when there is none.
SUITES = {"memory": memory, "nodes": nodes, "whole": whole, "telemetry": telemetry}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--model", help="a Hugging Face directory")
    parser.add_argument("--after", help="another, with what became of the model")
    parser.add_argument("--prompts", help="of whole: a file as `jaxdyn ledger` reads it")
    parser.add_argument("--prompt-template", default="auto", help="likewise")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--vocab", type=int, default=49152, help="of the random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=list(CASES), help="one of memory's processes")
    parser.add_argument("--memory-budget", type=int, default=4 * 2**30)
    parser.add_argument("--toy", action="store_true", help="a shape for the tests")
    harness.add_output(parser)
    given = parser.parse_args()
    given.shape = (2, 3, 4) if given.toy else (16, 32, 64)
    return given


def main() -> None:
    given = parse()
    if given.case:
        found = harness.measure(lambda: CASES[given.case](given), 0, lambda x: x)
        return print(json.dumps(found))
    for suite in harness.known(given.suites, SUITES):
        name = f"ledger_{suite}" + ("_toy" if given.toy else "")
        content = {"shape": given.shape, "model": bool(given.model), **SUITES[suite](given)}
        harness.write(given.output, name, content)


if __name__ == "__main__":
    main()
