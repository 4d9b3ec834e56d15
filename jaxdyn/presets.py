"""Pipelines with a name, to start from: `jaxdyn rl --preset NAME --field value …`.

`jaxdyn presets` lists them with what they need.
"""

import dataclasses
from typing import Any, NamedTuple

from jaxdyn.config import Config, RewardModelConfig, RunConfig, SFTConfig
from jaxdyn.data import DataConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.grammar import nearest
from jaxdyn.models import ModelConfig, SequenceHead
from jaxdyn.models.shapes import SHAPES
from jaxdyn.optim import OptimConfig
from jaxdyn.rewards import LearnedReward, RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import (
    EvaluationConfig,
    ModelSource,
    PairsConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxdyn.types import JaxdynError


class Preset(NamedTuple):
    """A pipeline: its commands in their order, each with its configuration.

    Attributes:
      text: what it is.
      shape: the policy's, a name of `SHAPES`.
      runs: configurations by command: sft, reward, rl.
      scorer: the reward model's shape, by name, if its scores are a model's; "" for the policy's.
      source: what the published source says of it, where it follows one; all else is ours.
      given: the fields that it leaves to be given.
    """

    text: str
    shape: str
    runs: dict[str, Config]
    scorer: str | None = None
    source: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def scoring(self) -> ModelConfig | None:
        """The reward model's shape."""
        if self.scorer is None:
            return None
        own = dataclasses.replace(SHAPES[self.shape], tied=False, head=SequenceHead())
        return SHAPES[self.scorer] if self.scorer else own


def epochs(count: int, rows: int, batch: int) -> int:
    """Steps that see so many rows so many times, the last of them in part."""
    return -(-count * rows // batch)


# -- the paper ------------------------------------------------------------------------------------

# Rows of HuggingFaceH4/ultrafeedback_binarized's prefs and of AlpacaFarm's sft.
ULTRAFEEDBACK, ALPACA_FARM, GSM8K = 61_135, 10_001, 7_473
_LIMIT, _PROMPTS = 512, 128

PAPER = Preset(
    "Tomihari 2026 (arXiv 2601.04670): GRPO on a reward model, standard and classifier first",
    "pythia-2.8b",
    {
        "sft": SFTConfig(
            output="runs/paper/sft",
            model=ModelSource("EleutherAI/pythia-2.8b", dtype="bfloat16", remat="full"),
            data=DataConfig("alpaca_farm", subset="sft", prompt_template="alpaca", overlong="drop"),
            reward=RewardConfig(("finished",)),
            sampling=SamplingConfig(max_completion_length=_LIMIT),
            optim=OptimConfig(learning_rate=2e-5, warmup_steps=7, decay="cosine"),
            train=SupervisedConfig(
                steps=epochs(3, ALPACA_FARM, 128),
                num_prompts=128,
                microbatches=8,
                max_prompt_length=_LIMIT,
            ),
        ),
        "rl": RunConfig(
            output="runs/paper/joint",
            model=ModelSource(
                "runs/paper/sft/model", dtype="bfloat16", frozen_dtype="bfloat16", remat="full"
            ),
            data=DataConfig("ultrafeedback", prompt_template="alpaca", overlong="drop"),
            reward=RewardConfig(
                ("model",),
                model=LearnedReward(
                    "RLHFlow/ArmoRM-Llama3-8B-v0.1", "bfloat16", 64, prompt_template="chat"
                ),
            ),
            sampling=SamplingConfig(max_completion_length=_LIMIT),
            loss=LossConfig("grpo", beta=0.04),
            optim=OptimConfig(
                learning_rate=1e-6, classifier_steps=epochs(1, ULTRAFEEDBACK, _PROMPTS)
            ),
            train=TrainConfig(
                steps=epochs(6, ULTRAFEEDBACK, _PROMPTS),
                num_prompts=_PROMPTS,
                num_generations=8,
                microbatches=32,
                max_prompt_length=_LIMIT,
                checkpoint_every=epochs(1, ULTRAFEEDBACK, _PROMPTS),
                keep_checkpoints=0,
            ),
            evaluation=EvaluationConfig(every=100, num_prompts=128, num_generations=16),
            probe=ProbeConfig(every=50, num_prompts=32, sites_per_completion=2),
        ),
    },
    scorer="armorm-8b",
    source=(
        "model.path of the supervised run",
        "data.name and subset of both",
        "reward.model.path",
        "loss.loss_type grpo with a KL (its weight is ours)",
        "optim.optimizer adam",
        "sampling.max_completion_length 512",
        "train.steps 6 epochs",
        "optim.classifier_steps 1 epoch",
    ),
)

# -- public chat models ---------------------------------------------------------------------------

_HH: dict[str, Any] = {"data": DataConfig("hh_rlhf", subset="helpful-base", overlong="drop")}
_SMOLLM2 = ModelSource("HuggingFaceTB/SmolLM2-135M-Instruct")

SMOLLM2_CHAT = Preset(
    "a small chat model, a reward model made from it on HH-RLHF's helpful pairs, RL against that",
    "smollm2-135m",
    {
        "reward": RewardModelConfig(
            output="runs/smollm2-135m-chat/reward",
            model=_SMOLLM2,
            **_HH,
            optim=OptimConfig(learning_rate=2e-5, warmup_steps=20, decay="linear"),
            train=PairsConfig(steps=600, num_prompts=32, microbatches=4, max_length=512),
            evaluation=EvaluationConfig(every=100, num_prompts=512),
        ),
        "rl": RunConfig(
            output="runs/smollm2-135m-chat/joint",
            model=dataclasses.replace(_SMOLLM2, untie=True),
            **_HH,
            reward=RewardConfig(
                ("model",),
                model=LearnedReward(
                    "runs/smollm2-135m-chat/reward/model", overlong="truncate-left"
                ),
            ),
            sampling=SamplingConfig(max_completion_length=128),
            loss=LossConfig(beta=0.04),
            optim=OptimConfig(learning_rate=2e-6, classifier_steps=50),
            train=TrainConfig(
                steps=300,
                num_prompts=16,
                num_generations=8,
                microbatches=4,
                max_prompt_length=256,
                keep_checkpoints=0,
            ),
            evaluation=EvaluationConfig(every=25, num_prompts=64),
            probe=ProbeConfig(every=10, num_prompts=16, sites_per_completion=2),
        ),
    },
    scorer="",
)


def _gsm8k(output: str, model: ModelSource, **changes: Any) -> RunConfig:
    """RL on GSM8K's questions, rewarded where the last number is the answer."""
    told: dict[str, Any] = {
        "data": DataConfig("gsm8k", overlong="drop"),
        "reward": RewardConfig(("numeric_match",)),
        "sampling": SamplingConfig(max_completion_length=320),
        "loss": LossConfig("dr_grpo"),
        "optim": OptimConfig(learning_rate=1e-6, warmup_steps=10, classifier_steps=40),
        "train": TrainConfig(
            steps=epochs(2, GSM8K, 64), num_prompts=64, microbatches=16, keep_checkpoints=0
        ),
        "evaluation": EvaluationConfig(every=40, num_prompts=128, num_generations=8),
        "probe": ProbeConfig(every=10, num_prompts=16, sites_per_completion=2),
    }
    return RunConfig(output=output, model=model, **{**told, **changes})


_WIDE: dict[str, Any] = {"dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "full"}

QWEN_2_5 = Preset(
    "GSM8K by a chat model",
    "qwen2.5-0.5b",
    {
        "rl": _gsm8k(
            "runs/qwen2.5-0.5b-gsm8k/joint",
            ModelSource("Qwen/Qwen2.5-0.5B-Instruct", untie=True, **_WIDE),
        )
    },
)
QWEN_3 = Preset(
    "GSM8K by a chat model without its thinking",
    "qwen3-0.6b",
    {
        "rl": _gsm8k(
            "runs/qwen3-0.6b-gsm8k/joint",
            ModelSource("Qwen/Qwen3-0.6B", untie=True, **_WIDE),
            data=DataConfig(
                "gsm8k", overlong="drop", chat_template_kwargs='{"enable_thinking": false}'
            ),
        )
    },
)
_PLAIN = DataConfig("gsm8k", prompt_template="alpaca", overlong="drop")
PYTHIA_70M = Preset(
    "GSM8K by a base model that first learns its form",
    "pythia-70m",
    {
        "sft": SFTConfig(
            output="runs/pythia-70m-gsm8k/sft",
            model=ModelSource("EleutherAI/pythia-70m"),
            data=_PLAIN,
            reward=RewardConfig(("numeric_match",)),
            sampling=SamplingConfig(max_completion_length=320),
            optim=OptimConfig(learning_rate=5e-5, warmup_steps=20, decay="cosine"),
            train=SupervisedConfig(steps=epochs(3, GSM8K, 32), num_prompts=32, microbatches=4),
            evaluation=EvaluationConfig(every=200, num_prompts=64),
        ),
        "rl": _gsm8k(
            "runs/pythia-70m-gsm8k/joint",
            ModelSource("runs/pythia-70m-gsm8k/sft/model"),
            data=_PLAIN,
        ),
    },
)

# -- on a CPU -------------------------------------------------------------------------------------

_ANAGRAMS: dict[str, Any] = {
    "data": DataConfig(name="anagrams"),
    "reward": RewardConfig(functions=("anagram",)),
    "sampling": SamplingConfig(max_completion_length=8),
}

QUICKSTART = Preset(
    "what `jaxdyn quickstart` does: anagrams, by a model that it makes",
    "quickstart",
    {
        "sft": SFTConfig(
            output="runs/anagrams/sft",
            model=ModelSource("runs/quickstart/new"),
            **_ANAGRAMS,
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, decay="cosine"),
            train=SupervisedConfig(
                steps=300,
                num_prompts=64,
                max_prompt_length=8,
                target_reward=0.35,
                checkpoint_every=100,
            ),
            evaluation=EvaluationConfig(every=10, num_prompts=64, num_generations=8),
        ),
        "rl": RunConfig(
            output="runs/anagrams/joint",
            model=ModelSource("runs/quickstart/sft/model"),
            **_ANAGRAMS,
            loss=LossConfig(beta=0.01),
            optim=OptimConfig(learning_rate=3e-4, classifier_steps=25),
            train=TrainConfig(steps=100, num_prompts=16, num_generations=8, max_prompt_length=8),
            evaluation=EvaluationConfig(every=25, num_prompts=64, num_generations=8),
            probe=ProbeConfig(every=5, num_prompts=32, sites_per_completion=2),
        ),
    },
)
STORIES = Preset(
    "a story's continuation with two given words, by a pretrained model of 260 thousand parameters",
    "stories260k",
    {
        "rl": RunConfig(
            output="runs/stories/joint",
            model=ModelSource(untie=True),
            data=DataConfig(name="stories"),
            reward=RewardConfig(functions=("contains_words", "finished"), weights=(0.5, 0.5)),
            sampling=SamplingConfig(max_completion_length=160),
            loss=LossConfig(beta=0.02),
            optim=OptimConfig(learning_rate=2e-4, classifier_steps=15),
            train=TrainConfig(
                steps=60,
                num_prompts=6,
                num_generations=8,
                max_prompt_length=64,
                checkpoint_every=15,
            ),
            evaluation=EvaluationConfig(num_prompts=32, num_generations=4),
            probe=ProbeConfig(every=5, num_prompts=32, sites_per_completion=2),
        ),
    },
    given=("model.path",),
)

PRESETS: dict[str, Preset] = {
    "paper": PAPER,
    "smollm2-135m-chat": SMOLLM2_CHAT,
    "qwen2.5-0.5b-gsm8k": QWEN_2_5,
    "qwen3-0.6b-gsm8k": QWEN_3,
    "pythia-70m-gsm8k": PYTHIA_70M,
    "stories260k": STORIES,
    "quickstart": QUICKSTART,
}


def _of(command: str) -> dict[str, Any]:
    return {name: one.runs[command] for name, one in PRESETS.items() if command in one.runs}


SFT, REWARD, RL = _of("sft"), _of("reward"), _of("rl")
"""The presets of each command."""


def preset(presets: dict, name: str):
    """The preset of that name; JaxdynError with the nearest one for an unknown name."""
    if name not in presets:
        known = ", ".join(presets)
        raise JaxdynError(f"unknown preset {name!r}{nearest(name, presets)} (there are: {known})")
    return presets[name]
