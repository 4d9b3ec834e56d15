"""What a ledger costs, beside the bare passes that no account can do without.

Claims (two CPU cores, float32, warm; medians and ratios over interleaved rounds):
  nodes   a node by component takes at most 3 forward passes; layers × kinds of a batch of
          completions at most 1.3 × (forward + backward pass with gradients).
  whole   a ledger of 16 completions of 64 tokens closes to its tolerance within five minutes at the
          shape of SmolLM2-135M (V 49152), in at most three copies of the parameters and one pass.
Command:  python experiments/benchmarks/ledger.py SUITE ... [--model DIRECTORY] [--after DIRECTORY]
Time:     ten minutes on two cores.
Expected: tables on the screen, results/ledger_SUITE.json. Without --model it is a random model of
          SmolLM2-135M's shape, and without --after its parameters moved by 1e-3 of their size.
"""

import argparse
import json
import statistics
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.dynamics import ledger, sites_from_rollout
from jaxdyn.dynamics.ledger_layers import text_parts
from jaxdyn.dynamics.ledger_path import Request, batches_of_texts, less, look, node
from jaxdyn.dynamics.observables import At
from jaxdyn.models import LanguageModel, llama, load_pretrained
from jaxdyn.types import Rollout, Sites

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


def problem(arguments: argparse.Namespace) -> tuple[LanguageModel, Any, Any, Sites]:
    """A model, its parameters before and after, and every token of some completions."""
    if arguments.model:
        model, before = load_pretrained(arguments.model)
    else:
        model = LanguageModel(TOY if arguments.toy else SMOLLM2)
        before = model.init(jax.random.key(0))
    if arguments.after:
        after = load_pretrained(arguments.after)[1]
    else:
        keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(before)))
        keys = jax.tree.unflatten(jax.tree.structure(before), list(keys))
        noise = lambda x, key: x + 1e-3 * jnp.std(x) * jax.random.normal(key, x.shape)
        after = jax.tree.map(noise, before, keys)
    count, prompt, completion = arguments.shape
    rng = np.random.default_rng(0)
    ids = lambda slots: jnp.asarray(rng.integers(0, model.config.vocab_size, (count, slots)))
    rollout = Rollout(
        prompt_ids=ids(prompt),
        prompt_mask=jnp.ones((count, prompt), bool),
        completion_ids=ids(completion),
        completion_mask=jnp.ones((count, completion), bool),
        per_token_logps=jnp.zeros((count, completion), jnp.float32),
    )
    return model, before, after, sites_from_rollout(rollout, completion, 0)


def nodes(arguments: argparse.Namespace) -> dict:
    """One node of each kind beside the bare passes, of one batch."""
    model, before, after, sites = problem(arguments)
    change = less(model.view(after), model.view(before))
    del after
    view = model.view(before)
    head = view["classifier"]
    batch, *others = batches_of_texts(model, sites, np.zeros((len(sites.rows), 0), np.int32), 2**40)
    assert not others
    start = look(model, view, head, batch).phi
    given = (view, change, head, batch.sites, batch.token_ids, start, batch.real)
    own = Sites(**jax.tree.map(jnp.asarray, batch.sites))

    @jax.jit
    def score(view):
        phi = model.features(view["backbone"], own.tokens, own.mask)[own.rows, own.positions]
        log_probs = jax.nn.log_softmax(model.logits(view["classifier"], phi))
        return jnp.sum(jnp.take_along_axis(log_probs, own.targets[:, None], axis=1))

    @jax.jit
    def layers(view, change, start):
        reference = jax.nn.log_softmax(model.logits(head, start))
        at = At(own.targets, jnp.asarray(batch.token_ids), reference)
        return text_parts(model, view, change, own, at, jnp.asarray(batch.real), ("log_prob",))

    cases = {
        "forward": lambda: score(view),
        "forward and backward": lambda: backward(view),
        "components": lambda: node(model, Request("parameters"), *given),
        "layers × kinds": lambda: layers(view, change, start),
    }
    backward = jax.jit(jax.grad(score))
    for run in cases.values():  # compiles
        jax.block_until_ready(run())
    rounds = [
        {name: harness.timed(run)[0] for name, run in cases.items()}
        for _ in range(arguments.rounds)
    ]
    floors = {"components": "forward", "layers × kinds": "forward and backward"}
    medians = {name: statistics.median(one[name] for one in rounds) for name in cases}
    ratios = {
        name: statistics.median(one[name] / one[floor] for one in rounds)
        for name, floor in floors.items()
    }
    print(f"\nnodes: {len(sites.rows)} sites, {harness.thermometer():.0f} GFLOP/s")
    for name, seconds in medians.items():
        beside = f"{ratios[name]:.2f} × {floors[name]}" if name in ratios else ""
        print(f"{name:<24}{seconds:>9.3f} s   {beside}")
    return {"medians": medians, "ratios": ratios, "rounds": rounds}


def whole(arguments: argparse.Namespace) -> dict:
    """A ledger from beginning to end, compilation included."""
    model, before, after, sites = problem(arguments)
    two = iter([before, after])
    del before, after
    seconds, found = harness.timed(
        lambda: vars(ledger(model, two, sites, memory_budget=arguments.memory_budget))
    )
    residual = {}
    for name in ("log_prob", "entropy", "kl"):
        change = np.diff(found["values"][name].astype(np.float64), axis=0)
        missing = sum(found["parts"][name].values()) - change
        residual[name] = float(np.sqrt(np.mean(missing**2) / np.mean(change**2)))
    count = int(found["nodes"].max())
    print(f"\nwhole: {seconds:.0f} s, {count} nodes, residuals {json.dumps(residual)}")
    return {"seconds": seconds, "nodes": count, "residual": residual}


SUITES = {"nodes": nodes, "whole": whole}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--model", help="a Hugging Face directory")
    parser.add_argument("--after", help="another, with what became of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-budget", type=int, default=4 * 2**30)
    parser.add_argument("--toy", action="store_true", help="a shape for the tests")
    harness.add_output(parser)
    given = parser.parse_args(arguments)
    given.shape = (2, 3, 4) if given.toy else (16, 32, 64)
    for suite in harness.known(given.suites, SUITES):
        name = f"ledger_{suite}" + ("_toy" if given.toy else "")
        content = {"shape": given.shape, "model": bool(given.model), **SUITES[suite](given)}
        harness.write(given.output, name, content)


if __name__ == "__main__":
    main()
