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
from jaxdyn.grammar import LARGEST_SEED, at_least
from jaxdyn.models import LoraConfig
from jaxdyn.optim import OptimConfig
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import AdvantageConfig, LossConfig, check_combination
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import EvaluationConfig, LoopConfig, MeshConfig, ModelSource, TrainConfig

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
        sizes = self.train.num_generations, self.sampling.max_completion_length
        check_combination(self.loss, self.advantage, *sizes)

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
    train: LoopConfig = LoopConfig(steps=300, num_prompts=64, checkpoint_every=100)
    evaluation: EvaluationConfig = EvaluationConfig(every=50)
    probe: ProbeConfig = ProbeConfig(every=0)

    @property
    def title(self) -> str:
        return "supervised" if self.optim.schedule == "joint" else f"supervised, {super().title}"


KINDS: dict[str, type[Config]] = {"rl": RunConfig, "sft": SFTConfig}
"""Every kind of run by what its configuration says; older files say nothing and are of RL."""
