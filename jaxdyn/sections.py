"""Sections of a configuration that belong to no room: the model's source, the mesh, the loop.

Imports no JAX, so that commands can read their options without it.
"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import MOST_ROWS, MOST_TOKENS, at_least, between, finite

AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh."""

MOST_DEVICES = 10**6


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the model comes from.

    Attributes:
      path: a Hugging Face directory, or a hub name.
      adapter: a PEFT adapter of it, a directory, with which training starts: trained on where the
        run trains adapters (optim.backbone, optim.classifier lora), else added to the weights.
      untie: give a tied model a classifier of its own (a copy of the embedding).
      dtype: compute dtype; parameters are float32.
      frozen_dtype: of the matrices that never move: the reference policy's, a frozen half's, those
        beside adapters, the body's under classifier_only and linear_probe. bfloat16 halves them;
        it changes no number of a run whose dtype is bfloat16, and rounds the weights of one in
        float32.
      remat: what an update keeps of the forward pass: each layer's input and dense outputs (dots),
        its input alone (full, the least memory), or all but attention's weights (none); the
        backward pass computes the rest again. Numbers stay the same.
    """

    path: str = ""
    untie: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "dots"
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices divide what; one of the three may be -1: all that the others leave.

    Attributes:
      data: copies of the parameters, each with its share of the batch.
      fsdp: parts of the batch that also share the parameters out between them.
      tensor: devices among which a sequence's heads and the vocabulary are divided.
      devices: how many to use; 0 for all of an accelerator's, and on a CPU one a process.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise JaxdynError(f"mesh.{name} must be at least 1, or -1, got {size}")
        at_least(-1, self, "mesh", *AXES, most=MOST_DEVICES)
        if list(sizes.values()).count(-1) > 1:
            raise JaxdynError(f"only one of mesh.{', mesh.'.join(AXES)} may be -1, got {sizes}")
        at_least(0, self, "mesh", "devices", most=MOST_DEVICES)

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The mesh's shape on so many devices; JaxdynError if they cannot be divided so."""
        asked = [getattr(self, name) for name in AXES]
        fixed = math.prod(size for size in asked if size > 0)
        filled = [devices // fixed if size == -1 else size for size in asked]
        if math.prod(filled) != devices:
            shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, asked, strict=True))
            raise JaxdynError(
                f"a mesh of {shape} does not divide {devices} devices; set mesh.data, mesh.fsdp "
                "and mesh.tensor to sizes whose product is that, or mesh.devices to their product"
            )
        return filled[0], filled[1], filled[2]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The shape of a training.

    Attributes:
      steps: steps of joint training, or of a linear probe; a classifier stage before it comes on
        top (optim.classifier_steps).
      num_prompts: prompts a step (P).
      microbatches: split each update's batch, to save memory; changes nothing else.
      max_prompt_length: longest prompt, in tokens.
      target_reward: stop once the reward on held-out prompts reaches this (0: never).
      checkpoint_every: steps between checkpoints (the end always has one).
      keep_checkpoints: how many of the newest to keep; 0 keeps all, for `jaxdyn analyze`.
      keep_best: a metric of the evaluations, like eval_reward: the checkpoint in which it was
        largest is kept beside the newest (`jaxdyn export RUN OUTPUT --step best`).
      trackers: who is told the metrics beside the run's own files; trackio and wandb are extras.
    """

    steps: int = 200
    num_prompts: int = 8
    microbatches: int = 1
    max_prompt_length: int = 256
    target_reward: float = 0.0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    keep_best: str = ""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)

    def __post_init__(self):
        at_least(1, self, "train", "num_prompts", "microbatches", most=MOST_ROWS)
        at_least(1, self, "train", "max_prompt_length", most=MOST_TOKENS)
        at_least(1, self, "train", "checkpoint_every")
        at_least(0, self, "train", "steps", "keep_checkpoints", "target_reward")
        if len(set(self.trackers)) < len(self.trackers):
            raise JaxdynError(f"train.trackers names one twice: {self.trackers}")
        if self.keep_best and not self.keep_best.startswith("eval_"):
            raise JaxdynError(
                "train.keep_best must name a metric of the evaluations, such as eval_reward, got "
                f"{self.keep_best!r}"
            )
        if self.sequences % self.microbatches:
            raise JaxdynError(
                f"train.microbatches must divide the {self.sequences} sequences of a step, got "
                f"{self.microbatches}"
            )

    @property
    def sequences(self) -> int:
        """Sequences a step."""
        return self.num_prompts

    @property
    def longest(self) -> int:
        """The limit beyond which `data.overlong` speaks, in tokens."""
        return self.max_prompt_length


@dataclasses.dataclass(frozen=True)
class SupervisedConfig(LoopConfig):
    """The shape of a supervised run.

    Attributes:
      packing: put a step's examples into as few rows of the longest's slots as hold them; changes
        nothing but the time.
    """

    packing: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The shape of an RL run.

    Attributes:
      num_generations: completions a prompt (G).
      num_iterations: inner epochs over a rollout batch.
      save_completions: training completions written a step.
      redraw_rounds: how many times at most a step draws other prompts in the place of those whose
        completions all score alike (DAPO's dynamic sampling); 0: never.
      reference_every: steps after which the KL's reference follows the policy; 0: it stays.
      reference_mixup: by how much: α of (1 - α) of the reference + α of the policy.
      update: how the update is compiled for several devices: by jit, over any mesh, or by pmap,
        which copies the parameters to each.
    """

    num_generations: int = 8
    num_iterations: int = 1
    save_completions: int = 2
    redraw_rounds: int = 0
    reference_every: int = 0
    reference_mixup: float = 0.6
    update: Literal["jit", "pmap"] = "jit"

    def __post_init__(self):
        at_least(1, self, "train", "num_generations", most=MOST_ROWS)
        at_least(1, self, "train", "num_iterations", most=1000)
        at_least(0, self, "train", "save_completions", "reference_every")
        at_least(0, self, "train", "redraw_rounds", most=1000)
        between(0, 1, self, "train", "reference_mixup", ends="(]")
        if self.reference_mixup != 0.6 and not self.reference_every:
            raise JaxdynError(
                "train.reference_mixup needs train.reference_every, which is 0; got "
                f"{self.reference_mixup}"
            )
        super().__post_init__()

    @property
    def sequences(self) -> int:
        return self.num_prompts * self.num_generations


@dataclasses.dataclass(frozen=True)
class PairsConfig(LoopConfig):
    """The shape of a training on preferences, a pair being two sequences.

    Attributes:
      num_prompts: pairs a step.
      max_length: longest prompt with an answer, in tokens; data.overlong says what becomes of a
        longer one.
    """

    num_prompts: int = 16
    max_prompt_length: Annotated[int, tyro.conf.Suppress] = 256
    target_reward: Annotated[float, tyro.conf.Suppress] = 0.0
    max_length: int = 1024

    def __post_init__(self):
        super().__post_init__()
        at_least(2, self, "train", "max_length")

    @property
    def longest(self) -> int:
        return self.max_length


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out prompts, before training, at its end, and in between.

    Attributes:
      every: steps between evaluations (0: only before and after).
      num_prompts: held-out prompts, the first of the test split.
      num_generations: completions a prompt.
      metrics: functions like those of reward.functions, with its columns and options; measured
        beside the reward and never part of it.
      success_threshold: a completion is correct, for pass@k, where its first metric, or without
        metrics its reward, is at least this.
      pass_at: the k of pass@k and the N of best-of-N, none above num_generations; the powers of
        two up to it, and itself, when none is given.
      temperatures: others to sample at before and after training; 0 is greedy.
    """

    every: int = 0
    num_prompts: int = 32
    num_generations: int = 4
    metrics: tuple[str, ...] = ()
    success_threshold: float = 1.0
    pass_at: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()

    def __post_init__(self):
        at_least(1, self, "evaluation", "num_prompts", "num_generations", most=MOST_ROWS)
        at_least(0, self, "evaluation", "every", "temperatures")
        finite(self, "evaluation", "success_threshold")
        for name in ("metrics", "pass_at", "temperatures"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise JaxdynError(f"evaluation.{name} names one twice: {values}")
        at_least(1, self, "evaluation", "pass_at")
        for k in self.pass_at:
            if not 1 <= k <= self.num_generations:
                raise JaxdynError(
                    f"evaluation.pass_at must lie between 1 and num_generations "
                    f"({self.num_generations}), got {k}"
                )
