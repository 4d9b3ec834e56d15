"""The options of `jaxdyn influence`, checked against each other before JAX is imported."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdyn.commands.text_options import bytes_of
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, MOST_TOKENS, at_least

Aggregation = Literal[
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
    "token-mean",
]


@dataclasses.dataclass(frozen=True)
class InfluenceOptions:
    """Which completions of a training step moved the policy where, by component and with all else
    that the step did; or, of --model and --completions, which would.

    Attributes:
      run: a directory of `jaxdyn rl`.
      step: with RUN, the step to take again, one with a checkpoint before it; the last that has.
      model: instead of RUN, a Hugging Face directory, or a hub name.
      completions: with --model, a JSON-lines or Parquet file with the columns prompt, completion
        and advantage (TRL's names): in the plain metric, per unit of learning rate.
      untie: with --model, give a tied one a classifier of its own (a copy of the embedding).
      sites: where to look: probe, the run's own probe sites; or batch, places in the completions
        themselves (the only one with --model).
      site_completions: batch: how many completions they lie in, evenly chosen (0: all).
      sites_per_completion: batch: beside its first token, so many inside each.
      by_token: completions, by number from 0, whose tokens are also taken one by one.
      momentum: with RUN, trace the update's momentum back to the batches of so many steps before
        it, which are taken again from a checkpoint there or earlier. 0: leave it whole.
      from_sketch: with --completions, a file of `jaxdyn sketch`: which of its rows' gradients
        those of log π of each whole completion are nearest to, and the most opposed.
      top: with --from-sketch, how many of each.
      aggregation: with --model, how the loss averages over tokens and completions.
      temperature: with --model, of the policy that the completions were sampled from.
      limit: with --model, use the first so many rows (0: all).
      max_prompt_length: with --model, longest prompt, in tokens; a longer one is refused.
      max_completion_length: with --model, completions are cut after so many tokens.
      output: the directory to write; by default influence-STEP in RUN, or runs/influence; with
        --from-sketch runs/nearest.
      memory_budget: beside the parameters, their moments and the result: 8GB, 512MiB or bytes.
      seed: of the places inside completions.
    """

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    step: int | None = None
    model: str | None = None
    completions: str | None = None
    untie: bool = False
    sites: Literal["probe", "batch"] | None = None
    site_completions: int = 16
    sites_per_completion: int = 3
    by_token: tuple[int, ...] = ()
    momentum: int = 0
    from_sketch: str | None = None
    top: int = 10
    aggregation: Aggregation = "sequence-mean-token-mean"
    temperature: float = 1.0
    limit: int = 64
    max_prompt_length: int = 512
    max_completion_length: int = 256
    output: str | None = None
    memory_budget: str = "4GiB"
    seed: int = 0

    def __post_init__(self):
        at_least(0, self, "", "site_completions", "sites_per_completion", "limit", "step")
        at_least(0, self, "", "temperature", "by_token", "momentum")
        at_least(0, self, "", "seed", most=LARGEST_SEED)
        at_least(1, self, "", "max_prompt_length", "max_completion_length", most=MOST_TOKENS)
        at_least(1, self, "", "top")
        bytes_of(self.memory_budget)
        if (self.run is None) == (self.model is None):
            raise JaxdynError("give a RUN or --model, " + ("not both" if self.run else "got none"))
        if self.from_sketch is not None:
            self._require_query()
            return
        if self.top != 10:
            raise JaxdynError(f"--top goes with --from-sketch FILE, got {self.top}")
        if self.model is None:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in _OUTSIDE and value != field.default:
                    option = f"--{field.name.replace('_', '-')}"
                    raise JaxdynError(f"{option} goes with --model: a run has its own, got {value}")
            return
        if self.completions is None:
            raise JaxdynError("--model needs --completions FILE, a JSON-lines or Parquet file")
        if self.step is not None or self.sites == "probe" or self.momentum:
            name = "momentum" if self.momentum else "sites probe"
            name = "step" if self.step is not None else name
            raise JaxdynError(f"--{name} is of a run: give RUN, not --model")

    def _require_query(self) -> None:
        if self.completions is None:
            raise JaxdynError("--from-sketch needs --completions FILE, whose rows are looked up")
        for field in dataclasses.fields(self):
            if field.name not in _QUERY and getattr(self, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise JaxdynError(f"{option} has no use with --from-sketch: leave it out")

    @property
    def look_at(self) -> str:
        """The sites, where none were named."""
        return self.sites or ("probe" if self.model is None else "batch")

    def destination(self, step: int | None) -> Path:
        """Where it goes."""
        if self.output is not None:
            return Path(self.output)
        if self.from_sketch is not None:
            return Path("runs/nearest")
        return Path(str(self.run)) / f"influence-{step}" if self.run else Path("runs/influence")


_OUTSIDE = frozenset({"completions", "untie", "aggregation", "temperature", "limit"})
_OUTSIDE |= {"max_prompt_length", "max_completion_length"}
_QUERY = frozenset(
    {"run", "step", "model", "untie", "completions", "limit", "output", "from_sketch"}
)
_QUERY |= {"top", "max_prompt_length", "max_completion_length", "memory_budget"}
