"""What one device does: whether its numbers are right, how fast it is, and what limits it.

Parts:
  numbers   every quantity in float32 and bfloat16 beside float64 on the host, with the error that
            rounding explains (device_numbers.py); the shape is its own.
  updates   the reference and both stages' updates as shares of the matrix rate and the bandwidth
            that were measured before, and peak memory beside what the compiler planned.
  decoding  prefill and rollout; decoding beside the bandwidth floor.
  steps     whole RL steps of both stages.
  kernels   log-prob kernel, trace by 16 probes and sketches of --sites sites.
  ledger    a node, and a whole ledger (SmolLM2-135M's shape).
  trl       the same RL step by TRL and by us, one after the other; not run where torch is not.
Claims (one H100 or H200, bfloat16): at Pythia-2.8B's shape the stage 2 update at 45 % or more of
the measured matrix rate and decoding at 60 % or more of the bandwidth floor; at Pythia-410m's the
log-prob kernel of 1024 sites at 40 % or more of the matrix rate; peak memory within 15 % of the
plan. None of them has been measured on a card yet.
Command:   python experiments/benchmarks/device.py [PARTS...] [--shape pythia-410m pythia-2.8b]
               --trl-python trl/bin/python (rl_step.py says what it needs)
Time:      minutes a part on a card. Each has a process of its own; one that is done, by its file,
           is shown again and not run: remove the file, or give --again.
Expected:  tables on the screen, results/device_CARD_PART_SHAPE.json.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import interleave
from peers.protocol import SHAPES, Shape, add_shape_arguments, name_of, shape_from

LARGE = ("pythia-410m", "pythia-2.8b")
REMAT = {"pythia-2.8b": "full"}
"""What an update keeps of its forward pass where "dots" would not fit into 80 GB."""


def in_cases(name: str) -> Callable[[Shape, argparse.Namespace], dict[str, Any]]:
    """A function of device_cases.py, which is imported where JAX may start."""

    def part(shape, chosen):
        import device_cases

        return getattr(device_cases, name)(shape, chosen)

    return part


def numbers(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Errors beside float64."""
    import device_numbers

    toy = shape == SHAPES["toy"]
    return device_numbers.measure(shape if toy else device_numbers.SHAPE)


def trl(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Whole steps of ours and of TRL's, one framework on the device at a time."""
    here = Path(interleave.HERE)
    commands = {
        "jaxdyn": [sys.executable, str(here / "jaxdyn_worker.py"), "gpt_neox", chosen.remat],
        "trl": [python_with_trl(chosen), str(here / "peers/trl_worker.py"), "gpt_neox"],
    }
    found: dict[str, Any] = {}
    for name, command in commands.items():
        with interleave.started({name: command}, shape, "step") as (worker,):
            first = worker.work()["step"]
            rounds = [worker.work() for _ in range(chosen.rounds)]
            middle = interleave.medians([{name: one} for one in rounds])[name]
            found[name] = {"about": worker.about, "first_seconds": first, "medians": middle}
            print(f"{name:<8}" + "  ".join(f"{part} {s:.4f}" for part, s in middle.items()))
    ratio = found["trl"]["medians"]["step"] / found["jaxdyn"]["medians"]["step"]
    print(f"theirs / ours: {ratio:.2f}")
    return {"shape": vars(shape), "frameworks": found, "ratio": ratio}


def python_with_trl(chosen: argparse.Namespace) -> str:
    """The Python named for it, or this one if it has torch and TRL; "" for none."""
    has = all(importlib.util.find_spec(name) for name in ("torch", "trl"))
    return chosen.trl_python or (sys.executable if has else "")


PARTS = {
    "numbers": numbers,
    **{name: in_cases(name) for name in ("updates", "decoding", "steps")},
    "kernels": in_cases("kernel_suite"),
    "ledger": in_cases("ledger"),
    "trl": trl,
}
SHAPELESS = ("numbers", "ledger")
"""Parts whose model is always the same."""


def measure(part: str, shape: Shape, chosen: argparse.Namespace) -> None:
    """A part at a shape, if it is not done; in the process whose memory it may fill."""
    if part == "trl" and not python_with_trl(chosen):
        print("\ntrl: not run, for there is no torch with TRL here; give --trl-python PATH")
        return
    named = "" if part in SHAPELESS and shape != SHAPES["toy"] else name_of(shape)
    card = re.sub(r"\W+", "_", harness.machine()["device"].lower())
    name = f"device_{card}_{part}{named}"
    path = chosen.output / f"{name}.json"
    if path.exists() and not chosen.again:
        print(f"\n{part}{named}: done, {path}")
        show(json.loads(path.read_text()))
        return
    print(f"\n{part}{named}", flush=True)
    found = PARTS[part](shape, chosen)
    print(f"-> {harness.write(chosen.output, name, found)}", flush=True)


def show(found: dict[str, Any]) -> None:
    """The programs of a finished part and their limits, in short."""
    for row in found.get("rows", []):
        share = max(row["shares"].values())
        print(f"  {row['name']:<20}{row['median_seconds']:>10.4g} s  {row['limit']} {share:.1%}")


def in_a_process(part: str, shape: Shape, chosen: argparse.Namespace) -> None:
    """`measure` in a process of its own; SystemExit if it fails."""
    spawned = multiprocessing.get_context("spawn").Process(
        target=alone, args=(part, shape, chosen), name=part
    )
    spawned.start()
    spawned.join()
    if spawned.exitcode:
        raise SystemExit(f"{part}: ended with exit code {spawned.exitcode}")


def alone(part: str, shape: Shape, chosen: argparse.Namespace) -> None:
    """Set the device's memory apart for us, but beside a peer, and measure."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false" if part == "trl" else "true"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    measure(part, shape, chosen)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    add_shape_arguments(parser, nargs="+", default=LARGE)
    parser.add_argument("--sites", type=int, default=1024, help="of the kernels (1024)")
    parser.add_argument("--rounds", type=int, default=5, help="measured ones (5)")
    parser.add_argument("--remat", choices=("none", "dots", "full"), help="of updates")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--trl-python", help="the Python that has trl")
    parser.add_argument("--again", action="store_true", help="what is done too")
    harness.add_output(parser)
    given = parser.parse_args()
    parts = harness.known(given.parts, PARTS)
    for part in parts:
        for name in given.shape[:1] if part in SHAPELESS else given.shape:
            remat = given.remat or REMAT.get(name, "dots")
            chosen = argparse.Namespace(**{**vars(given), "shape": name, "remat": remat})
            in_a_process(part, shape_from(chosen), chosen)


if __name__ == "__main__":
    main()
