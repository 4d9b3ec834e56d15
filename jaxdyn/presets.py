"""Configurations with a name, to start from: `jaxdyn rl --preset NAME --field value …`."""

from typing import Any

from jaxdyn.config import RunConfig, SFTConfig
from jaxdyn.data import DataConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.grammar import nearest
from jaxdyn.models import RotaryScaling, gemma3_text, gpt_neox, llama, qwen3
from jaxdyn.optim import OptimConfig
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, ModelSource, SupervisedConfig, TrainConfig
from jaxdyn.types import JaxdynError

_ANAGRAMS: dict[str, Any] = {
    "data": DataConfig(name="anagrams"),
    "reward": RewardConfig(functions=("anagram",)),
    "sampling": SamplingConfig(max_completion_length=8),
}

SFT = {
    "anagrams": SFTConfig(
        output="runs/anagrams/sft",
        model=ModelSource("runs/quickstart/new"),
        **_ANAGRAMS,
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, decay="cosine"),
        train=SupervisedConfig(
            steps=300, num_prompts=64, max_prompt_length=8, target_reward=0.35, checkpoint_every=100
        ),
        evaluation=EvaluationConfig(every=10, num_prompts=64, num_generations=8),
    ),
}

RL = {
    "anagrams": RunConfig(
        output="runs/anagrams/joint",
        model=ModelSource("runs/quickstart/sft/model"),
        **_ANAGRAMS,
        loss=LossConfig(beta=0.01),
        optim=OptimConfig(learning_rate=3e-4, classifier_steps=25),
        train=TrainConfig(steps=100, num_prompts=16, num_generations=8, max_prompt_length=8),
        evaluation=EvaluationConfig(every=25, num_prompts=64, num_generations=8),
        probe=ProbeConfig(every=5, num_prompts=32, sites_per_completion=2),
    ),
    "stories": RunConfig(
        output="runs/stories/joint",
        data=DataConfig(name="stories"),
        reward=RewardConfig(functions=("contains_words", "finished"), weights=(0.5, 0.5)),
        sampling=SamplingConfig(max_completion_length=160),
        loss=LossConfig(beta=0.02),
        optim=OptimConfig(learning_rate=2e-4, classifier_steps=15),
        train=TrainConfig(
            steps=60, num_prompts=6, num_generations=8, max_prompt_length=64, checkpoint_every=15
        ),
        evaluation=EvaluationConfig(num_prompts=32, num_generations=4),
        probe=ProbeConfig(every=5, num_prompts=32, sites_per_completion=2),
    ),
}

SHAPES = {
    # EleutherAI/pythia-2.8b, the paper's model.
    "pythia-2.8b": gpt_neox(vocab_size=50304, width=2560, num_layers=32, num_heads=32),
    # meta-llama/Llama-3.1-8B.
    "llama-8b": llama(
        vocab_size=128256,
        width=4096,
        num_layers=32,
        num_heads=32,
        mlp_width=14336,
        max_positions=131072,
        num_kv_heads=8,
        norm_eps=1e-5,
        rotary_base=500000.0,
        rotary_scaling=RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192),
    ),
    # Qwen/Qwen3-0.6B.
    "qwen3-0.6b": qwen3(
        vocab_size=151936,
        width=1024,
        num_layers=28,
        num_heads=16,
        mlp_width=3072,
        max_positions=40960,
        num_kv_heads=8,
        head_dim=128,
        rotary_base=1000000.0,
        tied=True,
    ),
    # google/gemma-3-1b-it.
    "gemma-3-1b": gemma3_text(
        vocab_size=262144,
        width=1152,
        num_layers=26,
        num_heads=4,
        mlp_width=6912,
        max_positions=32768,
        num_kv_heads=1,
        head_dim=256,
        window=512,
    ),
    "tiny": gpt_neox(vocab_size=512, width=64, num_layers=2, num_heads=4, max_positions=512),
}
"""Models to plan for, without weights: `jaxdyn plan NAME`."""


def preset(presets: dict, name: str):
    """The preset of that name; JaxdynError with the nearest one for an unknown name."""
    if name not in presets:
        known = ", ".join(presets)
        raise JaxdynError(f"unknown preset {name!r}{nearest(name, presets)} (there are: {known})")
    return presets[name]
