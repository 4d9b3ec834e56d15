"""The configuration of a run: frozen dataclasses, composed; JSON in and out.

Each room declares and checks its own part. Everything here is plain data, so that the resolved
configuration in a run's directory repeats the run.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxdyn.data import DataConfig
from jaxdyn.distributed import MeshConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.models import LoraConfig
from jaxdyn.optim import OptimConfig
from jaxdyn.paths import AnyPath
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import AdvantageConfig, LossConfig, advantage_kind, check_combination
from jaxdyn.rollout import SamplingConfig
from jaxdyn.types import JaxdynError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the model comes from.

    Attributes:
      path: a Hugging Face directory, or a hub name.
      untie: give a tied model a classifier of its own (a copy of the embedding).
      dtype: compute dtype; parameters are float32.
      remat: what an update keeps of the forward pass: each layer's input and dense outputs (dots),
        its input alone (full, the least memory), or all but attention's weights (none); the
        backward pass computes the rest again. Numbers stay the same.
    """

    path: str = ""
    untie: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "dots"


def _positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise JaxdynError(f"{prefix}.{name} must be at least 1, got {getattr(config, name)}")


def _not_negative(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise JaxdynError(f"{prefix}.{name} must not be negative, got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The shape of an RL run.

    Attributes:
      steps: steps of joint training; a classifier stage comes on top (optim.classifier_steps).
      num_prompts: prompts a step (P).
      num_generations: completions a prompt (G).
      num_iterations: inner epochs over a rollout batch.
      microbatches: split each update's batch, to save memory; changes nothing else.
      max_prompt_length: longest prompt, in tokens.
      checkpoint_every: steps between checkpoints (the end always has one).
      keep_checkpoints: how many of the newest to keep; 0 keeps all, for `jaxdyn analyze`.
      keep_best: a metric of the evaluations, like eval_reward: the checkpoint in which it was
        largest is kept beside the newest (`jaxdyn export RUN OUTPUT --step best`).
      save_completions: training completions written a step.
      update: how the update is compiled for several devices: by jit, over any mesh, or by pmap,
        which copies the parameters to each.
    """

    steps: int = 200
    num_prompts: int = 8
    num_generations: int = 8
    num_iterations: int = 1
    microbatches: int = 1
    max_prompt_length: int = 256
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    keep_best: str = ""
    save_completions: int = 2
    update: Literal["jit", "pmap"] = "jit"

    def __post_init__(self):
        _positive(self, "train", "num_prompts", "num_generations", "num_iterations")
        _positive(self, "train", "microbatches", "max_prompt_length", "checkpoint_every")
        _not_negative(self, "train", "steps", "keep_checkpoints", "save_completions")
        if self.keep_best and not self.keep_best.startswith("eval_"):
            raise JaxdynError(
                "train.keep_best names a metric of the evaluations, such as eval_reward; got "
                f"{self.keep_best!r}"
            )
        if self.num_prompts * self.num_generations % self.microbatches:
            raise JaxdynError(
                f"train.microbatches ({self.microbatches}) must divide num_prompts * "
                f"num_generations ({self.num_prompts * self.num_generations})"
            )


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
        _positive(self, "evaluation", "num_prompts", "num_generations")
        _not_negative(self, "evaluation", "every")
        for name in ("metrics", "pass_at", "temperatures"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise JaxdynError(f"evaluation.{name} names one twice: {values}")
        for k in self.pass_at:
            if not 1 <= k <= self.num_generations:
                raise JaxdynError(
                    f"evaluation.pass_at must lie between 1 and num_generations "
                    f"({self.num_generations}), got {k}"
                )
        for temperature in self.temperatures:
            if not 0 <= temperature < math.inf:
                raise JaxdynError(
                    f"evaluation.temperatures must be 0 (greedy) or above, got {temperature}"
                )
        if not math.isfinite(self.success_threshold):
            raise JaxdynError(
                f"evaluation.success_threshold must be finite, got {self.success_threshold}"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One RL run, whole.

    Attributes:
      output: the run's directory; the same command goes on with a run that was stopped.
      seed: of the data's order and of every random draw.
    """

    output: str = "runs/rl"
    seed: int = 0
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    probe: ProbeConfig = ProbeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _not_negative(self, "run", "seed")
        check_combination(
            self.loss,
            self.advantage,
            self.train.num_generations,
            self.sampling.max_completion_length,
        )

    @property
    def advantage_kind(self) -> str:
        """The advantage's kind: as set, or the loss's own."""
        return advantage_kind(self.loss, self.advantage)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised training on the `completion` column.

    Attributes:
      output: the run's directory; the trained model is left in its `model`.
      seed: of the data's order and of every random draw.
      steps: updates.
      batch_size: sequences an update.
      learning_rate: AdamW's peak, after `warmup_steps`, with cosine decay to zero.
      target_reward: stop once the sampled reward on held-out prompts reaches this (0: never);
        looked at every `evaluate_every` steps.
    """

    output: str = "runs/sft"
    seed: int = 0
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    target_reward: float = 0.0
    evaluate_every: int = 50
    checkpoint_every: int = 100
    max_prompt_length: int = 256

    def __post_init__(self):
        _positive(self, "sft", "steps", "batch_size", "checkpoint_every", "max_prompt_length")
        _not_negative(self, "sft", "seed", "warmup_steps", "weight_decay", "max_grad_norm")
        _not_negative(self, "sft", "evaluate_every", "target_reward")
        if not self.learning_rate > 0:
            raise JaxdynError(f"learning_rate must be positive, got {self.learning_rate}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain data."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: Path) -> None:
    """Write the configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_config(kind: type[Config], path: AnyPath) -> Config:
    """Read a configuration back; JaxdynError for a file that is not one, naming the field."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise JaxdynError(f"no such configuration file: {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JaxdynError(f"{path} is not a JSON file: {error}") from error
    return from_dict(kind, data, where=str(path))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, for error messages; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_dict(kind: type[Config], data: Any, where: str = "config") -> Config:
    """Build a configuration from plain data, refusing unknown fields and wrong types by name."""
    if not isinstance(data, dict):
        raise JaxdynError(f"{where}: expected an object with fields, got {data!r}")
    fields = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise JaxdynError(f"{where}: unknown field {name!r}{nearest(name, fields)}")
    hints = typing.get_type_hints(kind)
    return kind(**{n: _value(hints[n], v, f"{where}: {n}") for n, v in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a field's type: dataclass, Literal, optional, tuple or plain."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _value(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise JaxdynError(f"{where}: expected one of {arguments}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise JaxdynError(f"{where}: expected {len(kinds)} values, got {value!r}")
        pairs = zip(kinds, value, strict=True)
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise JaxdynError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
