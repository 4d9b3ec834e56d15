"""The trainings that the claims are asked of: RUNS/ARM/seed-K, run directories of jaxdyn.

Seeds differ in the data's order, in sampling and in the probe's sites; with the anagrams also in
the base model, of which there are three (seed mod 3), each with held-out letters of its own. Arms
of one seed share all else, so that they are pairs.

Command:   python experiments/trainings.py --preset anagram --output runs/anagram [--seeds 12]
           [--arms joint classifier_first …]
           stories and chat want --model DIRECTORY, a model in the Hugging Face layout.
Time:      5 CPU seconds a run of the anagram model, half an hour for the twelve seeds of the
           arms of claim 5; five minutes a run of stories, three to five of chat.
Expected:  run directories; what is there is skipped, what was stopped goes on.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arithmetic
import jax

from jaxdyn.config import Config, RunConfig, SFTConfig
from jaxdyn.data import AnagramsConfig, DataConfig, character_tokenizer
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.models import LanguageModel, gpt_neox
from jaxdyn.optim import OptimConfig
from jaxdyn.presets import RL
from jaxdyn.rewards import Length, RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, SupervisedConfig, TrainConfig
from jaxdyn.train import run_rl, run_sft
from jaxdyn.train.export import save_policy

MULTIPLIERS = (1, 3, 10, 30, 100)
BASES = 3


def replaced(config: Any, changes: dict[str, Any]) -> Any:
    """`config` with fields changed, named by dots."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            value = replaced(getattr(config, head), {rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config


# -- arms -----------------------------------------------------------------------------------------


def swept(schedule: str) -> dict[str, dict[str, Any]]:
    """A schedule by the multiplier m of the classifier's learning rate."""
    name = lambda m: schedule if m == 1 else f"{schedule}_m{m}"
    return {
        name(m): {"optim.schedule": schedule, "optim.classifier_multiplier": float(m)}
        for m in MULTIPLIERS
    }


CORE = {
    "joint": {},
    # Its beginning is joint training with m.
    **swept("joint_extra"),
    **swept("classifier_first"),
    **swept("classifier_only"),
}
OTHERS: dict[str, dict[str, Any]] = {
    "shuffled": {"reward": None},
    **swept("whitened_first"),
    "whitened_only": {"optim.schedule": "whitened_only"},
    **{f"spill_{e:g}": {"optim.schedule": "spill", "optim.spill_budget": e} for e in (0.0, 0.001)},
    **{f"entropy_{c:g}": {"loss.entropy_coefficient": c} for c in (0.003, 0.01, 0.03)},
    **{f"beta_{b:g}": {"loss.beta": b} for b in (0.0, 0.1)},
    **{f"temperature_{t:g}": {"sampling.temperature": t} for t in (0.7, 1.4)},
    **{f"loss_{name}": {"loss.loss_type": name} for name in ("dr_grpo", "rloo", "gspo", "cispo")},
}
SUPERVISED = {
    "sft": {"optim.schedule": "joint"},
    "linear_probe_then_finetune": {"optim.schedule": "linear_probe_then_finetune"},
}
ARMS = (*CORE, *OTHERS, *SUPERVISED)


# -- models and tasks -----------------------------------------------------------------------------

LETTERS = AnagramsConfig(train_examples=4000, test_examples=200)


def anagram_parts(base: int) -> dict[str, Any]:
    """What an anagram model's supervised and RL runs share."""
    return {
        "data": DataConfig("anagrams", anagrams=dataclasses.replace(LETTERS, seed=base)),
        "reward": RewardConfig(("anagram",)),
        "sampling": SamplingConfig(max_completion_length=8),
    }


def anagram_base(output: Path, base: int, target: float = 0.3, steps: int = 600) -> Path:
    """A base model: random, then supervised until it is partly right; its directory."""
    made = output / f"base-{base}"
    if made.exists():
        return made
    new, seed = output / "making" / f"new-{base}", 1000 + base
    tokenizer = character_tokenizer(LETTERS.letters + "=")
    shape = {"width": 64, "num_layers": 2, "num_heads": 4, "max_positions": 64}
    model = LanguageModel(gpt_neox(tokenizer.vocab_size, **shape, rotary_fraction=1.0))
    if not new.exists():
        save_policy(new, model, model.init(jax.random.key(seed)), tokenizer)
    config = SFTConfig(
        output=str(output / "making" / f"sft-{base}"),
        seed=seed,
        model=ModelSource(str(new)),
        **anagram_parts(base),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, decay="cosine"),
        train=SupervisedConfig(
            steps=steps,
            num_prompts=64,
            max_prompt_length=8,
            target_reward=target,
            checkpoint_every=steps,
            trackers=(),
        ),
        evaluation=EvaluationConfig(every=20, num_prompts=64, num_generations=8),
    )
    trained = Path(str(run_sft(config)))
    shutil.copytree(trained, output / f"base-{base}.part", dirs_exist_ok=True)
    (output / f"base-{base}.part").rename(made)
    return made


def anagram(output: Path, model: Path | None, seed: int) -> RunConfig:
    """Standard RL of the anagram model."""
    base = seed % BASES
    return RunConfig(
        output="",
        seed=seed,
        model=ModelSource(str(model or anagram_base(output, base))),
        **anagram_parts(base),
        loss=LossConfig(beta=0.01),
        optim=OptimConfig(learning_rate=4e-4, classifier_steps=15),
        train=TrainConfig(
            steps=60,
            num_prompts=16,
            num_generations=8,
            max_prompt_length=8,
            checkpoint_every=15,
            keep_checkpoints=0,
            trackers=(),
        ),
        evaluation=EvaluationConfig(every=15, num_prompts=64, num_generations=8),
        probe=ProbeConfig(every=15, num_prompts=16, sites_per_completion=2),
    )


def toy(output: Path, model: Path | None, seed: int) -> RunConfig:
    """A few steps of a model that is hardly trained: that everything runs."""
    model = model or anagram_base(output, seed % BASES, steps=2)
    few = {"num_prompts": 4, "num_generations": 4}
    changes = {
        # It has no anagram right; some of its completions are shorter.
        "reward": RewardConfig(("length",), length=Length(maximum=0, slack=9)),
        "optim.classifier_steps": 2,
        "train": TrainConfig(
            steps=4,
            **few,
            max_prompt_length=8,
            checkpoint_every=2,
            keep_checkpoints=0,
            trackers=(),
        ),
        "evaluation": EvaluationConfig(every=2, **few),
        "probe": ProbeConfig(every=2, num_prompts=4, sites_per_completion=2),
    }
    return replaced(anagram(output, model, seed), changes)


def stories(output: Path, model: Path | None, seed: int) -> RunConfig:
    """Standard RL of the pretrained story model, shorter than the preset."""
    changes = {
        "seed": seed,
        "model": ModelSource(str(model), untie=True),
        "optim.classifier_steps": 10,
        "sampling.max_completion_length": 96,
        "train.steps": 30,
        "train.checkpoint_every": 10,
        "train.keep_checkpoints": 0,
        "train.trackers": (),
        "evaluation": EvaluationConfig(every=10, num_prompts=32, num_generations=4),
        "probe": ProbeConfig(every=10, num_prompts=16, sites_per_completion=2),
    }
    return replaced(RL["stories260k"], changes)


def chat(output: Path, model: Path | None, seed: int) -> RunConfig:
    """Standard RL of a chat model on sums in words, shorter than experiments/arithmetic.py."""
    output.mkdir(parents=True, exist_ok=True)
    told = {"learning_rate": 3e-6, "temperature": 0.7, "steps": 20, "test_problems": 32}
    chosen = argparse.Namespace(output=output, model=model, classifier_steps=5, **told)
    changes = {
        "seed": seed,
        # A reference, so that the KL to the start is measured.
        "loss.beta": 0.001,
        "train.checkpoint_every": 10,
        "train.keep_checkpoints": 0,
        "train.trackers": (),
        "evaluation.every": 5,
        "probe": ProbeConfig(every=10, num_prompts=16, sites_per_completion=2),
    }
    return replaced(arithmetic.run_config(chosen, arithmetic.write_problems(output)), changes)


PRESETS: dict[str, Callable[[Path, Path | None, int], RunConfig]] = {
    "toy": toy,
    "anagram": anagram,
    "stories": stories,
    "chat": chat,
}
SHUFFLED = {"toy": "length", "anagram": "anagram", "stories": "story", "chat": "numeric_match"}
FEW = ("joint", "joint_extra", "joint_extra_m10", "classifier_first", "classifier_first_m10")
OF_PRESET = {
    "toy": ARMS,
    "anagram": ARMS,
    # Their prompts have no completions to learn from.
    "stories": (*CORE, *OTHERS),
    "chat": (*FEW, "shuffled", "whitened_first", "spill_0", "entropy_0.01"),
}
"""The arms of a preset; where a run is long, fewer."""


# -- runs -----------------------------------------------------------------------------------------


def config_of(preset: str, arm: str, output: Path, model: Path | None, seed: int) -> Config:
    """The configuration of a run."""
    where = str(output / arm / f"seed-{seed}")
    base = replaced(PRESETS[preset](output, model, seed), {"output": where})
    if arm in SUPERVISED:
        return replaced(supervised(base), SUPERVISED[arm])
    changes = {**CORE, **OTHERS}[arm]
    if arm == "shuffled":
        changes = {"reward": RewardConfig((f"shuffled:{SHUFFLED[preset]}",))}
    return replaced(base, changes)


def supervised(base: RunConfig) -> SFTConfig:
    """Supervised training with the same model, prompts, batches, steps and watching."""
    names = (
        "output",
        "seed",
        "model",
        "data",
        "reward",
        "sampling",
        "optim",
        "evaluation",
        "probe",
    )
    shape = {
        f.name: getattr(base.train, f.name)
        for f in dataclasses.fields(SupervisedConfig)
        if hasattr(base.train, f.name)
    }
    return SFTConfig(
        **{name: getattr(base, name) for name in names}, train=SupervisedConfig(**shape)
    )


def is_done(run: Path) -> bool:
    """Whether a run has come to its end."""
    return (run / "done").exists()


def train(preset: str, arm: str, output: Path, model: Path | None, seed: int) -> None:
    """A run, to its end, unless it is there."""
    run = output / arm / f"seed-{seed}"
    if is_done(run):
        return
    config = config_of(preset, arm, output, model, seed)
    (run_sft if arm in SUPERVISED else run_rl)(config)
    (run / "done").touch()


def train_all(
    preset: str, names: Sequence[str], output: Path, model: Path | None, seeds: int
) -> None:
    """Every arm of every seed; arms of a seed in turn, so that their times can be compared."""
    jax.config.update("jax_compilation_cache_dir", str(output.absolute() / "compiled"))
    for seed in range(seeds):
        for arm in names:
            train(preset, arm, output, model, seed)
        print(f"seed {seed}: {len(names)} runs in {output}", flush=True)


def base_model(preset: str, output: Path) -> Path:
    """The model of the seed 0, for presets that make their own."""
    return Path(PRESETS[preset](output, None, 0).model.path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="the preset's when not given")
    chosen = parser.parse_args()
    arms = chosen.arms or OF_PRESET[chosen.preset]
    train_all(chosen.preset, arms, chosen.output, chosen.model, chosen.seeds)


if __name__ == "__main__":
    main()
