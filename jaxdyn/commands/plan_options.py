"""The options of `jaxdyn plan`; those of a run have the run's own defaults."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.grammar import MOST_ROWS, MOST_TOKENS, at_least
from jaxdyn.sections import MeshConfig, ModelSource, TrainConfig


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile a run's programs for TPUs, GPUs or this machine: memory, time and limits per chip.

    Attributes:
      preset: the model's shape, by name: pythia-2.8b, llama-8b, qwen3-0.6b, gemma-3-1b, tiny or
        another.
      topology: a slice as v5p:4x4x4 or v5e-64, GPUs as h100:8 or h100:2x8, or `here`.
      mesh: how its chips divide the work; when not given, several ways are tried.
      meshes: how many, each by three compilations.
      num_prompts: prompts a step (P).
      num_generations: completions a prompt (G).
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest completion, in tokens.
      microbatches: parts of each update's batch.
      reward_model: the shape of a reward model that lies there too, by name: armorm-8b or another.
      reward_dtype: what it is held in, and computes in.
      untie: give a tied model a classifier of its own, so that there is a stage 1.
      remat: what an update keeps of the forward pass (see `jaxdyn rl --help`).
      largest: find the largest batch that fits, by one to four more compilations.
      json: also write the figures to this file.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    topology: str = "here"
    mesh: MeshConfig = MeshConfig()
    meshes: int = 2
    num_prompts: int = TrainConfig.num_prompts
    num_generations: int = TrainConfig.num_generations
    max_prompt_length: int = TrainConfig.max_prompt_length
    max_completion_length: int = 256
    microbatches: int = TrainConfig.microbatches
    reward_model: str | None = None
    reward_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    untie: bool = False
    remat: Literal["none", "dots", "full"] = ModelSource.remat
    largest: bool = True
    json: str | None = None

    def __post_init__(self):
        at_least(1, self, "", "meshes")
        at_least(1, self, "", "num_prompts", "num_generations", "microbatches", most=MOST_ROWS)
        at_least(1, self, "", "max_prompt_length", "max_completion_length", most=MOST_TOKENS)
