"""What scoring by a reward model costs beside a bare forward pass of its body.

Claims: at one shape, a program of scores takes at most 1.1 times as long as one of features alone;
and so does a call from texts to numbers, tokenising, batches and the way back included.
Command:   python experiments/benchmarks/reward.py --rows 16 --slots 256 --rounds 15
           --layers 4 --width 256 --vocab 2048 --dtype float32, or larger.
Time:      a minute on two quiet CPU cores.
Expected:  a table on the screen, results/reward.json.

All rows fill all slots, so that the three compute the same tokens. Each round takes all three one
after the other. Ratios: of the medians; the median of the rounds' own; and of the medians of the
processor's time, the better witness on a CPU that others use too.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.data import DataConfig, character_tokenizer
from jaxdyn.distributed import one_device
from jaxdyn.models import LanguageModel, SequenceHead, llama
from jaxdyn.rewards import LearnedReward
from jaxdyn.train.scorer import Scorer, jitted_scores

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def make_scorer(chosen: argparse.Namespace) -> Scorer:
    """A reward model with random weights."""
    config = llama(
        chosen.vocab,
        chosen.width,
        chosen.layers,
        num_heads=max(chosen.width // 64, 2),
        max_positions=chosen.slots,
        head=SequenceHead(1, pad_id=0),
        tied=False,
    )
    layout = one_device()
    platform = layout.mesh.devices.flat[0].platform
    model = LanguageModel(config, jnp.dtype(chosen.dtype).type).on(platform)
    params = layout.place(model.init(jax.random.key(0)))
    options = LearnedReward("random", dtype=chosen.dtype, batch_size=chosen.rows)
    tokenizer = character_tokenizer(ALPHABET)
    return Scorer("model", model, params, tokenizer, layout, options, DataConfig())


def cases(scorer: Scorer, chosen: argparse.Namespace) -> dict:
    """What is timed, by name: each a function of nothing."""
    model, params = scorer.model, scorer.params
    letters = np.random.default_rng(0).choice(list(ALPHABET), (chosen.rows, chosen.slots - 2))
    half = chosen.slots // 2
    prompts, answers = (
        ["".join(row) for row in part] for part in (letters[:, :half], letters[:, half:])
    )
    rows = [scorer.read(*texts) for texts in zip(prompts, answers, strict=True)]
    tokens = jnp.array(rows, jnp.int32)
    if tokens.shape != (chosen.rows, chosen.slots):
        raise SystemExit(f"rows of {tokens.shape} tokens, wanted {chosen.rows, chosen.slots}")
    mask = jnp.ones(tokens.shape, bool)
    features = jax.jit(model.features)
    return {
        "features": lambda: features(params["backbone"], tokens, mask),
        "scores": lambda: jitted_scores(model, params, tokens, mask, None),
        "texts": lambda: scorer(prompts, answers),
    }


def measure(chosen: argparse.Namespace) -> dict:
    """Seconds of every case by round, medians, and ratios to the bare pass."""
    timed = cases(make_scorer(chosen), chosen)
    for function in timed.values():
        harness.timed(function)
    rounds = [{name: seconds(f) for name, f in timed.items()} for _ in range(chosen.rounds)]
    middle = lambda of: statistics.median(map(of, rounds))
    medians = {name: middle(lambda r, n=name: r[n]["wall"]) for name in timed}
    ratios = {
        name: {
            "of_medians": medians[name] / medians["features"],
            "by_round": middle(lambda r, n=name: r[n]["wall"] / r["features"]["wall"]),
            "of_processor_time": middle(lambda r, n=name: r[n]["processor"])
            / middle(lambda r: r["features"]["processor"]),
        }
        for name in ("scores", "texts")
    }
    return {"rounds": rounds, "medians": medians, "ratios": ratios}


def seconds(function: Callable[[], Any]) -> dict[str, float]:
    """On the clock, and of this process on all cores."""
    before = time.process_time()
    wall = harness.timed(function)[0]
    return {"wall": wall, "processor": time.process_time() - before}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = {"rows": 16, "slots": 256, "layers": 4, "width": 256, "vocab": 2048, "rounds": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    harness.add_output(parser)
    chosen = parser.parse_args()
    found = measure(chosen)
    for name, median in found["medians"].items():
        ratio = found["ratios"].get(name)
        pair = "  ".join(f"{x:.3f}" for x in ratio.values()) if ratio else ""
        print(f"{name:<10}{1e3 * median:>10.2f} ms  {pair}")
    shape = {name: getattr(chosen, name) for name in (*sizes, "dtype")}
    print(f"-> {harness.write(chosen.output, 'reward', {'shape': shape, **found})}")


if __name__ == "__main__":
    main()
