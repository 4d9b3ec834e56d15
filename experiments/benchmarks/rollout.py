"""How fast completions are generated: tokens a second beside the peers' samplers and the floor.

Claims: generation within 1.15 of a bare JAX program's time (peers/floor.py) on two CPU cores, and
faster than Tunix's sampler and transformers' generate at every case below; on an accelerator, with
a named shape, decoding at 60 % or more of the bandwidth floor.
Command:   python experiments/benchmarks/rollout.py CASE ... (all of them without one)
               --tunix-python tunix/bin/python --trl-python trl/bin/python --rounds 15
           --shape pythia-410m or pythia-2.8b, and a flag for every size (rl_step.py has more).
Time:      about ten minutes on two quiet CPU cores.
Expected:  a table a case, results/rollout.json.

A call has P prompts and G generations of each: sequences that share a prompt share its prefill with
us and in the floor, while the peers' samplers take P G prompts. The bandwidth floor of a decoding
step is the time in which the device moves, at the rate of a copy, the weights in the compute dtype
(without the embedding, of which a few rows are read) and the keys and values written so far. The
call's whole time counts, prefill and sampling included. Of a small shape on a CPU the share exceeds
1: its weights stay in the processor's cache.
"""

import argparse
import dataclasses

import harness
import interleave
from peers.protocol import Shape, add_shape_arguments, name_of, shape_from

CASES = {
    "plain": {},
    "wide": {"prompts": 8},
    "long": {"completion_length": 256},
    "prompted": {"prompt_length": 256},
    "ungrouped": {"prompts": 16, "generations": 1},
}


def bytes_of_decoding(shape: Shape, parameters: int) -> float:
    """Weights and filled cache slots, read once in each step after the prefill."""
    size = 4 if shape.dtype == "float32" else 2
    weights = (parameters - shape.vocab * shape.width) * size
    slot = 2 * shape.layers * shape.width * size
    steps = shape.completion_length - 1
    filled = shape.prompt_length + shape.completion_length / 2
    return steps * (weights + shape.rows * filled * slot)


def report(found: dict, shape: Shape) -> None:
    """Tokens a second, milliseconds a decoding step, the share of the floor, and ratios."""
    print(f"\n{'':<18}{'tokens/s':>10}{'ms/step':>9}{'of floor':>10}{'theirs / ours':>20}")
    for name, seconds in found["medians"].items():
        rate = found["speed"][name]
        ratio = found["ratios"].get(name, {}).get("generate")
        pair = f"{ratio['of_medians']:.2f}, {ratio['by_round']:.2f}" if ratio else ""
        print(
            f"{name:<18}{rate['tokens_per_second']:>10.0f}"
            f"{1e3 * seconds['generate'] / shape.completion_length:>9.3f}"
            f"{rate['share_of_bandwidth_floor']:>10.1%}{pair:>20}"
        )


def case(shape: Shape, chosen: argparse.Namespace) -> dict:
    """Every framework's sampler at a shape, interleaved."""
    found = interleave.interleaved(shape, "generate", chosen)
    bandwidth = harness.copy_rate()
    found["copy_bytes_per_second"] = bandwidth
    found["speed"] = {
        name: {
            "tokens_per_second": shape.rows * shape.completion_length / seconds["generate"],
            "share_of_bandwidth_floor": bytes_of_decoding(shape, found["about"][name]["parameters"])
            / bandwidth
            / seconds["generate"],
        }
        for name, seconds in found["medians"].items()
    }
    report(found, shape)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    add_shape_arguments(parser)
    interleave.add_peer_arguments(parser)
    harness.add_output(parser)
    chosen = parser.parse_args()
    shape = shape_from(chosen)
    cases = {
        name: case(dataclasses.replace(shape, **CASES[name]), chosen)
        for name in harness.known(chosen.cases, CASES)
    }
    print(f"-> {harness.write(chosen.output, f'rollout{name_of(shape)}', cases)}")


if __name__ == "__main__":
    main()
