"""RL of a chat model against a reward model learned from preferences: what is gained, and of what.

A reward model is made from the policy's own start and trained on one half of the preference pairs;
a judge of the same kind, on other pairs and for half as long, never rewards anything. RL then
pursues the first, standard and classifier first, while both score held-out prompts: where the
learned reward rises and the judge does not, the policy has found what the reward model gets wrong
(Gao et al. 2022, arXiv 2210.10760). Length and KL are followed beside them, and the ledger says
through which component the policy changed (Tomihari 2026, arXiv 2601.04670).

Command:   python experiments/preferences.py --model DIRECTORY --pairs FILE
               [--output runs/preferences]
           DIRECTORY holds a chat model in the Hugging Face layout, SmolLM2-135M-Instruct, say;
           FILE has HH-RLHF's rows: prompt, chosen, rejected, a JSON object a line.
Time:      about an hour for 135 million parameters on two CPU cores; 10 GB of disk. Started
           again, it goes on where it stopped.
Expected:  a few hundred pairs teach little: accuracies of 0.61 and 0.65, where preferring the
           longer answer has 0.59. The learned reward rises from -0.45 to -0.35, the judge does not
           follow.
           preferences.json and preferences.png.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from jaxdyn.commands import ledger
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.config import RewardModelConfig, RunConfig
from jaxdyn.data import DataConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.optim import OptimConfig
from jaxdyn.report import load_run
from jaxdyn.rewards import LearnedReward, RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, PairsConfig, TrainConfig
from jaxdyn.train import open_run, run_reward, run_rl

PARTS = {"reward": 0.4, "judge": 0.4, "test": 0.2}
"""Who sees which share of the pairs."""
SCHEDULES = ("joint", "classifier_first")
FOLLOWED = {
    "eval_reward": "learned reward, held-out prompts",
    "eval_metrics/judge": "judge, held-out prompts",
    "eval_completions/mean_length": "tokens a completion, held-out prompts",
    "kl": "KL to the start, nats a token",
}


def divide(pairs: Path, output: Path) -> dict[str, str]:
    """The pairs in an order of their own, by who sees them."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.round(np.cumsum(list(PARTS.values())) * len(rows)).astype(int)
    files = {}
    for name, places in zip(PARTS, np.split(order, ends[:-1]), strict=True):
        path = output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(rows[i]) + "\n" for i in places), encoding="utf-8")
        files[name] = str(path)
    return files


def reward_config(chosen: argparse.Namespace, files: dict[str, str], name: str) -> Any:
    """A reward model's training on its share of the pairs."""
    steps = chosen.reward_steps if name == "reward" else -(-chosen.reward_steps // 2)
    return RewardModelConfig(
        output=str(chosen.output / f"{name}-model"),
        model=ModelSource(str(chosen.model)),
        data=DataConfig(
            "hh_rlhf", path=files[name], test_path=files["test"], overlong="truncate-left"
        ),
        optim=OptimConfig(learning_rate=5e-5, warmup_steps=min(5, steps), decay="linear"),
        train=PairsConfig(
            steps=steps, num_prompts=4, max_length=128, checkpoint_every=1000, keep_checkpoints=1
        ),
        evaluation=EvaluationConfig(num_prompts=chosen.test_pairs),
    )


def rl_config(chosen: argparse.Namespace, files: dict[str, str], models: dict[str, str]) -> Any:
    """Standard RL against the reward model, scored by the judge too."""
    scored = lambda name: LearnedReward(models[name], overlong="truncate-left")
    return RunConfig(
        output=str(chosen.output / "joint"),
        model=ModelSource(str(chosen.model), untie=True),
        data=DataConfig("hh_rlhf", path=files["reward"], test_path=files["test"], overlong="drop"),
        reward=RewardConfig(("model",), model=scored("reward"), judge=scored("judge")),
        sampling=SamplingConfig(max_completion_length=32),
        loss=LossConfig(beta=0.02),
        optim=OptimConfig(learning_rate=2e-5, classifier_steps=chosen.classifier_steps),
        train=TrainConfig(
            steps=chosen.steps,
            num_prompts=4,
            num_generations=4,
            max_prompt_length=64,
            checkpoint_every=20,
            keep_checkpoints=1,
        ),
        evaluation=EvaluationConfig(
            every=chosen.every, num_prompts=8, num_generations=4, metrics=("judge",)
        ),
        probe=ProbeConfig(every=0),
    )


def write_ledger(run: Path, config: RunConfig) -> dict[str, Any]:
    """What a run did at held-out prompts that its start and its end complete, in short."""
    directory = run.parent / f"ledger-{run.name}"
    if not (directory / "ledger.npz").exists():
        with open_run(run) as saved:
            prompts = [example["prompt"] for example in saved.task.test[:4]]
        path = run.parent / "ledger-prompts.jsonl"
        lines = [json.dumps({"prompt": str(prompt)}) + "\n" for prompt in prompts]
        path.write_text("".join(lines), encoding="utf-8")
        options = LedgerOptions(
            (config.model.path, str(run)),
            prompts=str(path),
            output=str(directory),
            prompt_template="none",
            sample="both",
            max_prompt_length=config.train.max_prompt_length,
            max_completion_length=config.sampling.max_completion_length,
            tolerance=1e-2,
            by_layer=(),
        )
        ledger.run(options)
    return json.loads((directory / "ledger.json").read_text())["quantities"]


def measured(line: dict[str, Any], *names: str) -> dict[str, Any]:
    """Of a line of metrics what begins so."""
    return {key: value for key, value in line.items() if key.startswith(names)}


def draw(runs: dict[str, Any], path: Path) -> None:
    """The over-optimisation curves: both scores, length and KL along training."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, (key, title) in zip(axes.flat, FOLLOWED.items(), strict=True):
        for name, run in runs.items():
            points = [(x["step"], x[key], x) for x in run["curve"] if key in x]
            steps, values, lines = zip(*points, strict=True) if points else ((), (), ())
            (line,) = axis.plot(steps, values, label=name, marker="o" if "eval" in key else None)
            ends = [[x.get(f"{key}_ci_{end}", np.nan) for x in lines] for end in ("low", "high")]
            axis.fill_between(steps, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
    axes.flat[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--output", default="runs/preferences", type=Path)
    parser.add_argument("--reward-steps", default=100, type=int)
    parser.add_argument("--test-pairs", default=100, type=int)
    parser.add_argument("--steps", default=40, type=int)
    parser.add_argument("--classifier-steps", default=10, type=int)
    parser.add_argument("--every", default=10, type=int, help="steps between evaluations")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    files = divide(chosen.pairs, chosen.output)
    found: dict[str, Any] = {"reward_models": {}, "runs": {}}
    models = {}
    for name in ("reward", "judge"):
        config = reward_config(chosen, files, name)
        models[name] = str(run_reward(config))
        lines = load_run(config.output).metrics
        ends = {"before": lines[0], "after": lines[-1]}
        found["reward_models"][name] = {
            when: measured(line, "eval_", "time/wall") for when, line in ends.items()
        }
    base = rl_config(chosen, files, models)
    for schedule in SCHEDULES:
        optim = dataclasses.replace(base.optim, schedule=schedule)
        config = dataclasses.replace(base, output=str(chosen.output / schedule), optim=optim)
        run = Path(str(run_rl(config)))
        curve = [
            {"step": line["step"], **measured(line, *FOLLOWED, "reward", "time/wall")}
            for line in load_run(run).metrics
        ]
        found["runs"][schedule] = {"curve": curve, "ledger": write_ledger(run, config)}
        text = json.dumps(found, indent=1)
        (chosen.output / "preferences.json").write_text(text + "\n")
        draw(found["runs"], chosen.output / "preferences.png")
    for name, ends in found["reward_models"].items():
        after = ends["after"]
        spoken = lambda key, of=after: (
            f"{of[key]:.2f} ({of[f'{key}_ci_low']:.2f} to {of[f'{key}_ci_high']:.2f})"
        )
        print(
            f"{name}: held-out accuracy {spoken('eval_accuracy')}, of the longer answer "
            f"{spoken('eval_length_accuracy')}"
        )


if __name__ == "__main__":
    main()
