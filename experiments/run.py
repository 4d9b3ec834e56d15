"""All of it on one model: the trainings, every claim's script, and the page of findings.

Command:   python experiments/run.py anagram [--seeds 12] [--size full]
           python experiments/run.py stories --model DIRECTORY
Time:      of the anagram model two hours on two CPU cores; most of it the trainings.
Expected:  runs in runs/findings/PRESET, answers in experiments/results/findings/NAME, the page in
           docs/findings.md. What is there is left as it is, so that what was stopped goes on. A
           script that fails is named at the end, and the others are not kept from running.
"""

import argparse
import importlib
import sys
import traceback
from pathlib import Path
from typing import get_args

import frame
import page
import trainings

NAMES = {
    "toy": "toy",
    "anagram": "anagram",
    "stories": "stories260k",
    "chat": "SmolLM2-135M-Instruct",
}
"""What the page calls a preset's model."""


def ask(script: str, arguments: list[str]) -> Path:
    """A claim's script with these arguments; returns its JSON."""
    module = importlib.import_module(script)
    parser = getattr(module, "parser", frame.parser)
    return frame.keep(parser(module.__doc__).parse_args(arguments), script, module.find)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("preset", choices=tuple(trainings.PRESETS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--runs", type=Path, help="runs/findings/PRESET when not given")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=trainings.ARMS)
    parser.add_argument("--size", choices=get_args(frame.Size), default="small")
    parser.add_argument("--output", type=Path, default=page.RESULTS)
    parser.add_argument("--scripts", nargs="+", choices=tuple(page.CLAIMS), default=page.CLAIMS)
    chosen = parser.parse_args()
    runs = chosen.runs or Path("runs/findings") / chosen.preset
    arms = chosen.arms or trainings.OF_PRESET[chosen.preset]
    trainings.train_all(chosen.preset, arms, runs, chosen.model, chosen.seeds)
    model = chosen.model or trainings.base_model(chosen.preset, runs)
    name = NAMES[chosen.preset]
    arguments = ["--runs", str(runs), "--model", str(model), "--name", name]
    arguments += ["--size", chosen.size, "--output", str(chosen.output)]
    failed = []
    for script in chosen.scripts:
        try:
            ask(script, arguments)
        except Exception:
            traceback.print_exc()
            failed.append(script)
    if chosen.output == page.RESULTS:
        page.PAGE.write_text(page.page())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
