"""The configuration of a run: frozen dataclasses, composed, one grammar for every kind of run.

Each room declares and checks its own section; what belongs to no room is in `sections`. Everything
here is plain data, so that the resolved configuration in a run's directory repeats the run.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.data import DataConfig
from jaxdyn.dynamics import ProbeConfig
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, at_least, one_of
from jaxdyn.models import LoraConfig
from jaxdyn.optim import OF_RL, SUPERVISED, OptimConfig
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import AdvantageConfig, LossConfig, check_combination, compares_generations
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import (
    EvaluationConfig,
    LoopConfig,
    MeshConfig,
    ModelSource,
    PairsConfig,
    SupervisedConfig,
    TrainConfig,
)

MOST_TOKENS_A_STEP = 2**31 - 1
"""Tokens are counted in int32."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What every kind of training is told.

    Attributes:
      output: the run's directory; the same command goes on with a run that was stopped.
      seed: of the data's order and of every random draw.
      profile: steps of which a profiler's trace is left in the run's `profile`.
    """

    kind: Annotated[str, tyro.conf.Suppress]
    output: str
    seed: int = 0
    profile: tuple[int, ...] = ()
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    probe: ProbeConfig = ProbeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        at_least(0, self, "", "seed", most=LARGEST_SEED)
        at_least(0, self, "", "profile")
        longest = self.train.max_prompt_length + self.sampling.max_completion_length
        if (tokens := self.train.sequences * longest) > MOST_TOKENS_A_STEP:
            raise JaxdynError(
                f"train and sampling make a step of {self.train.sequences} sequences of up to "
                f"{longest} tokens; the product must be at most {MOST_TOKENS_A_STEP}, got {tokens}"
            )

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return self.optim.schedule

    @property
    def critic(self) -> bool:
        """Whether a value head learns beside the policy."""
        return False

    @property
    def copied(self) -> bool:
        """Whether the update wants all parameters on every device."""
        return False


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
    """One RL run, whole.

    Attributes:
      output: the run's directory; the same command goes on with a run that was stopped.
      seed: of the data's order and of every random draw.
      profile: steps of which a profiler's trace is left in the run's `profile`.
    """

    kind: Annotated[Literal["rl"], tyro.conf.Suppress] = "rl"
    output: str = "runs/rl"
    train: TrainConfig = TrainConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()

    def __post_init__(self):
        super().__post_init__()
        one_of(OF_RL, self.optim, "optim", "schedule")
        sizes = self.train.num_generations, self.sampling.max_completion_length
        check_combination(self.loss, self.advantage, *sizes)
        own_rule = self.optim.whitened or self.optim.spills
        if own_rule and (self.loss.critic or self.train.update == "pmap"):
            what = f"loss {self.loss.loss_type}" if self.loss.critic else "train.update pmap"
            raise JaxdynError(
                f"optim.schedule {self.optim.schedule} moves the classifier's weight by a rule of "
                f"its own, and knows no {what}"
            )
        self._check_redraw()
        self._check_reference()
        if self.loss.covariance.control == "kl" and self.train.num_iterations < 2:
            raise JaxdynError(
                "loss.covariance.control kl penalises what the policy moves within a step: "
                f"train.num_iterations must be at least 2, got {self.train.num_iterations}"
            )
        sampling = self.sampling
        filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if self.loss.importance.support and not filtered:
            raise JaxdynError(
                "loss.importance.support needs sampling.top_k, top_p or min_p: all are off, "
                "and the support is the vocabulary"
            )

    def _check_redraw(self):
        alone = not compares_generations(self.loss, self.advantage)
        if self.train.redraw_rounds and alone:
            raise JaxdynError(
                f"train.redraw_rounds is of no use to loss {self.loss.loss_type} with advantages "
                "that compare no generations of a prompt: equal ones have a signal, got "
                f"{self.train.redraw_rounds}"
            )

    def _check_reference(self):
        if not (every := self.train.reference_every):
            return
        if not self.loss.beta:
            raise JaxdynError(
                f"train.reference_every is {every} but loss.beta is 0: there is no reference"
            )
        if "lora" in (self.optim.backbone, self.optim.classifier):
            raise JaxdynError(
                "train.reference_every mixes weights, and mixed factors of adapters are none of "
                f"them: optim.backbone and optim.classifier must not be lora, got {every}"
            )
        if self.model.frozen_dtype != "float32":
            raise JaxdynError(
                f"train.reference_every is {every}: a reference that moves is not frozen, and "
                f"model.frozen_dtype must be float32, got {self.model.frozen_dtype}"
            )

    @property
    def critic(self) -> bool:
        return self.loss.critic

    @property
    def copied(self) -> bool:
        return self.train.update == "pmap"


@dataclasses.dataclass(frozen=True)
class SFTConfig(Config):
    """Supervised training on the `completion` column.

    Attributes:
      output: the run's directory; the trained model is left in its `model`.
      seed: of the data's order and of every random draw.
      profile: steps of which a profiler's trace is left in the run's `profile`.
    """

    kind: Annotated[Literal["sft"], tyro.conf.Suppress] = "sft"
    output: str = "runs/sft"
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=20, decay="cosine")
    train: SupervisedConfig = SupervisedConfig(steps=300, num_prompts=64, checkpoint_every=100)
    evaluation: EvaluationConfig = EvaluationConfig(every=50)
    probe: ProbeConfig = ProbeConfig(every=0)

    def __post_init__(self):
        super().__post_init__()
        one_of(SUPERVISED, self.optim, "optim", "schedule")

    @property
    def title(self) -> str:
        return "supervised" if self.optim.schedule == "joint" else f"supervised, {super().title}"


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(Config):
    """Train a reward model on preferences, the columns `chosen` and `rejected`; `jaxdyn reward
    score` scores files with one.

    loss = − mean over pairs of log σ(r(chosen) − r(rejected))        (Bradley and Terry)

    Starts from a language model, with a head of zeros, or from a reward model.

    Attributes:
      output: the run's directory; the trained model is left in its `model`.
      seed: of the data's order.
      profile: steps of which a profiler's trace is left in the run's `profile`.
    """

    kind: Annotated[Literal["reward"], tyro.conf.Suppress] = "reward"
    output: str = "runs/reward"
    data: DataConfig = DataConfig(name="hh_rlhf", overlong="drop")
    reward: Annotated[RewardConfig, tyro.conf.Suppress] = RewardConfig()
    sampling: Annotated[SamplingConfig, tyro.conf.Suppress] = SamplingConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-5, warmup_steps=10, decay="linear")
    train: PairsConfig = PairsConfig()
    evaluation: EvaluationConfig = EvaluationConfig(every=50, num_prompts=256)
    probe: Annotated[ProbeConfig, tyro.conf.Suppress] = ProbeConfig(every=0)

    def __post_init__(self):
        super().__post_init__()
        one_of(SUPERVISED, self.optim, "optim", "schedule")
        if self.optim.classifier == "lora":
            raise JaxdynError("optim.classifier must be full or frozen: a score's head is one row")
        for name in ("metrics", "temperatures"):
            if getattr(self.evaluation, name):
                raise JaxdynError(f"evaluation.{name} is of runs that sample, got some")
        if self.probe.every:
            raise JaxdynError(
                f"probe.every must be 0: no token is predicted, got {self.probe.every}"
            )

    @property
    def title(self) -> str:
        return "reward model" if self.optim.schedule == "joint" else f"reward, {super().title}"


KINDS: dict[str, type[Config]] = {"rl": RunConfig, "sft": SFTConfig, "reward": RewardModelConfig}
"""Every kind of run by what its configuration says; older files say nothing and are of RL."""
