"""RL of a chat model with a reward that a program checks: sums that it can partly do.

A problem reads "Ben has 6 shells and gets 7 more. How many?" after one that is solved. The reward
is 1 where the last number of the answer is right. No pair of numbers is in both splits. pass@k on
held-out problems before and after says whether RL made right answers likelier (pass@1) or only
sharpened what some of k samples had right already (pass@8).

Command:   python experiments/arithmetic.py --model DIRECTORY [--output runs/arithmetic]
           DIRECTORY holds a chat model in the Hugging Face layout, SmolLM2-135M-Instruct, say.
Time:      about 15 minutes a schedule for 135 million parameters on two CPU cores; 4 GB of disk.
           Started again, it goes on where it stopped.
Expected:  the start has 0.12 (0.07 to 0.17) of its answers right, and one of eight at 0.48 (0.33 to
           0.63) of the problems. After four steps with a learning rate of 1e-5 these were 0.70 and
           0.96: most of it form, for 0.91 of the answers were then written as the sum that is
           shown, and 0.13 before. So arithmetic.json counts that too; arithmetic.png.
"""

import argparse
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from jaxdyn.config import RunConfig
from jaxdyn.data import DataConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.optim import OptimConfig
from jaxdyn.report import load_run
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, TrainConfig
from jaxdyn.train import run_rl

NAMES = ("Lily", "Mia", "Ben", "Anna", "Sam", "Lucy", "Max", "Leo")
THINGS = ("apples", "books", "coins", "stickers", "marbles", "pencils", "cups", "shells")
SHOWN = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Tom has 3 cards and gets 4 more. How many?"},
    {"role": "assistant", "content": "3 + 4 = 7"},
]
SMALLEST, LARGEST, HELD_OUT = 2, 12, 0.25
WORDINGS = 4
"""Of each pair of numbers."""


def problems() -> dict[str, list[dict[str, Any]]]:
    """The problems of each split, in some wordings of each pair of numbers."""
    rng = np.random.default_rng(0)
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = rng.permutation(list(itertools.product(numbers, numbers))).tolist()

    def one(a, b):
        asked = f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)} and gets {b} more. How many?"
        prompt = [*SHOWN, {"role": "user", "content": asked}]
        return {"prompt": prompt, "answer": str(a + b)}

    test = round(HELD_OUT * len(pairs))
    shares = {"test": pairs[:test], "train": pairs[test:]}
    worded = lambda share: [one(*pair) for _ in range(WORDINGS) for pair in share]
    return {split: worded(share) for split, share in shares.items()}


def write_problems(output: Path) -> dict[str, str]:
    """Their files, by split."""
    files = {}
    for split, rows in problems().items():
        path = output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    return files


def run_config(chosen: argparse.Namespace, files: dict[str, str]) -> RunConfig:
    """Standard RL."""
    return RunConfig(
        output=str(chosen.output / "joint"),
        model=ModelSource(str(chosen.model), untie=True),
        data=DataConfig("jsonl", path=files["train"], test_path=files["test"]),
        reward=RewardConfig(("numeric_match",)),
        sampling=SamplingConfig(max_completion_length=16, temperature=chosen.temperature),
        loss=LossConfig("dr_grpo"),
        optim=OptimConfig(
            learning_rate=chosen.learning_rate,
            warmup_steps=3,
            classifier_steps=chosen.classifier_steps,
        ),
        train=TrainConfig(
            steps=chosen.steps,
            num_prompts=4,
            num_generations=8,
            max_prompt_length=64,
            checkpoint_every=20,
            keep_checkpoints=1,
        ),
        evaluation=EvaluationConfig(num_prompts=chosen.test_problems, num_generations=8),
        probe=ProbeConfig(every=0),
    )


def written_as_shown(run: Path) -> dict[str, dict[str, float]]:
    """Of held-out answers before and after: how many are written "a + b = c", and how many of those
    are right."""
    lines = (run / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {}
    for when, step in (("before", rows[0]["step"]), ("after", rows[-1]["step"])):
        own = [row for row in rows if row["step"] == step]
        shown = [r["reward"] for r in own if re.match(r"\d+ \+ \d+ = \d+", r["completion"])]
        right = sum(shown) / len(shown) if shown else 0.0
        found[when] = {"share": len(shown) / len(own), "right": right}
    return found


def draw(runs: dict[str, Any], path: Path) -> None:
    """pass@k before and after, and the reward along training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for number, (name, run) in enumerate(runs.items()):
        for when, dashes in (("before", ":"), ("after", "-")):
            ks = [key for key in run[when] if "_" not in key]
            mean, low, high = (
                np.array([run[when].get(key + end, np.nan) for key in ks])
                for end in ("", "_ci_low", "_ci_high")
            )
            left.errorbar(
                [int(key.removeprefix("pass@")) for key in ks],
                mean,
                (mean - low, high - mean),
                color=f"C{number}",
                linestyle=dashes,
                marker="o",
                capsize=3,
                label=f"{name}, {when}",
            )
        rewards = np.array(run["rewards"])
        width = min(5, len(rewards))
        smooth = np.convolve(rewards, np.ones(width) / width, "valid")
        right.plot(np.arange(len(smooth)) + width - 1, smooth, color=f"C{number}", label=name)
    left.set(xlabel="k", title="pass@k, held-out problems, 95 % intervals", ylim=(0, 1.03))
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:.0f}")
    right.set(xlabel="step", title="reward in training, mean of five steps", ylim=(0, 1.03))
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--output", default="runs/arithmetic", type=Path)
    parser.add_argument("--schedules", nargs="+", default=["joint"])
    parser.add_argument("--steps", default=40, type=int)
    parser.add_argument("--classifier-steps", default=10, type=int)
    parser.add_argument("--learning-rate", default=3e-6, type=float)
    parser.add_argument("--temperature", default=0.7, type=float)
    parser.add_argument("--test-problems", default=48, type=int)
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    base, found = run_config(chosen, write_problems(chosen.output)), {}
    for schedule in chosen.schedules:
        optim = dataclasses.replace(base.optim, schedule=schedule)
        run = run_rl(dataclasses.replace(base, output=str(chosen.output / schedule), optim=optim))
        lines = load_run(run).metrics
        of = lambda line: {
            key.removeprefix("eval_"): value
            for key, value in line.items()
            if key.startswith("eval_pass@")
        }
        found[schedule] = {
            "before": of(lines[0]),
            "after": of(lines[-1]),
            "rewards": [line["reward"] for line in lines[1:]],
            "mixed_groups": [1 - line["frac_reward_zero_std"] for line in lines[1:]],
            "written_as_shown": written_as_shown(Path(str(run))),
            "seconds": lines[-1]["time/wall"],
            "config": json.loads((Path(str(run)) / "config.json").read_text()),
        }
        (chosen.output / "arithmetic.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, chosen.output / "arithmetic.png")
        for when in ("before", "after"):
            one = found[schedule][when]
            said = [
                f"{key} {one[key]:.2f} ({one[f'{key}_ci_low']:.2f} to {one[f'{key}_ci_high']:.2f})"
                for key in one
                if "_" not in key
            ]
            print(f"{schedule}, {when}: {', '.join(said)}")


if __name__ == "__main__":
    main()
