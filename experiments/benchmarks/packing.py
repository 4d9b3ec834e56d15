"""Supervised tokens a second with and without packing, on dialogues of many lengths.

Claim:     on the rows of Anthropic's HH, packing learns at least 1.5 times as many completion
           tokens a second, by the same loss.
Command:   python experiments/benchmarks/packing.py --data hh/train.jsonl --tokenizer DIRECTORY
           --data has an object a line with `prompt` and `chosen` (or --completion-field);
           --context leaves longer rows out; rl_step.py's flags give the decoder's sizes.
Time:      about five minutes on two quiet CPU cores.
Expected:  a line a batch and the ratio, results/packing.json.

Both updates are taken of the same batches, one after another, by the process's seconds and by the
clock's: the first hardly change where the cores are shared with others.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import harness
from peers.protocol import Shape, add_shape_arguments, shape_from

WAYS = ("apart", "packed")


def batches(chosen: argparse.Namespace) -> tuple[int, list[dict[str, tuple]]]:
    """The vocabulary's size, and every batch's rows in either way."""
    from jaxdyn.data import batch_indices, encode_supervised, load_tokenizer, pack

    tokenizer = load_tokenizer(chosen.tokenizer)
    rows = [json.loads(line) for line in chosen.data.read_text().splitlines()]
    pairs = [(row["prompt"], row[chosen.completion_field]) for row in rows]
    short = [pair for pair in pairs if len(tokenizer.encode("".join(pair))) < chosen.context]
    found = []
    for step in range(chosen.batches):
        indices = batch_indices(0, step, chosen.examples, len(short))
        prompts, completions = zip(*(short[i] for i in indices), strict=True)
        encoded = encode_supervised(tokenizer, prompts, completions, chosen.context)
        found.append({"apart": encoded, "packed": pack(*encoded)})
    return tokenizer.vocab_size, found


def run(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every batch's update in either way, and what it holds."""
    import engine
    import jax
    import numpy as np

    from jaxdyn.optim import OptimConfig
    from jaxdyn.train import fresh_state
    from jaxdyn.train.sft import supervised_update

    vocab, given = batches(chosen)
    shape = dataclasses.replace(shape, vocab=vocab, prompt_length=chosen.context)
    model, optim = engine.model_of(shape, "llama"), OptimConfig(learning_rate=1e-5)
    params = jax.jit(model.init)(jax.random.key(0))
    found = []
    for batch in given:
        case: dict[str, Any] = {"tokens": int(np.sum(batch["apart"][2])), "loss": {}}
        for way in WAYS:
            case[way] = {"seconds": [], "process_seconds": []}
            case[way]["shape"] = list(batch[way][0].shape)
            case[way]["filled"] = float(np.mean(np.asarray(batch[way][1]) != 0))
        for number in range(-1, chosen.rounds):
            for way in WAYS:
                state = fresh_state(model, params, optim, "joint")
                static = {"model": model, "optim": optim.rule}
                update = lambda s=state, b=batch[way], o=static: supervised_update(
                    s, {}, b, np.float32(1e-5), **o
                )
                began = time.process_time()
                seconds, (_, metrics) = harness.timed(update)
                used = time.process_time() - began
                if number >= 0:
                    case[way]["seconds"].append(seconds)
                    case[way]["process_seconds"].append(used)
                case["loss"][way] = float(metrics["loss"])
        found.append(case)
        print(
            f"{case['tokens']:>6} completion tokens; "
            + "; ".join(
                f"{way} {case[way]['shape']}, {case[way]['filled']:.0%} filled, "
                f"{statistics.median(case[way]['seconds']):.3f} s, loss {case['loss'][way]:.6f}"
                for way in WAYS
            ),
            flush=True,
        )
    return {"shape": dataclasses.asdict(shape), "cases": found, "ratio": ratios(found)}


def ratios(cases: list[dict]) -> dict[str, float]:
    """Tokens a second, packed / apart, of all batches together, by rounds' medians."""
    of = lambda kind, way: sum(statistics.median(case[way][kind]) for case in cases)
    return {kind: of(kind, "apart") / of(kind, "packed") for kind in ("seconds", "process_seconds")}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--completion-field", default="chosen")
    parser.add_argument("--context", type=int, default=1024, help="longest row (1024)")
    parser.add_argument("--examples", type=int, default=16, help="of a batch (16)")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="measured updates of a batch (5)")
    add_shape_arguments(parser)
    harness.add_output(parser)
    chosen = parser.parse_args()
    found = run(shape_from(chosen), chosen)
    print("tokens a second, packed / apart: " + json.dumps(found["ratio"]))
    print(f"-> {harness.write(chosen.output, 'packing', found)}")


if __name__ == "__main__":
    main()
