"""The options of `jaxdyn evaluate`, checked against each other before JAX is imported."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, MOST_ROWS, at_least, finite
from jaxdyn.storage.paths import AnyPath, open_path


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Reward, task metrics, pass@k and best-of-N on held-out prompts, with 95 % intervals.

    Attributes:
      run: a directory of `jaxdyn rl`.
      step: with RUN, which checkpoint, or "best" (train.keep_best); the newest when not given.
      model: instead of RUN, a Hugging Face directory, or a hub name.
      untie: with --model, give a tied one a classifier of its own (a copy of the embedding).
      config: with --model, the prompts, reward and sampling of a run's config.json …
      preset: … or of a preset of `jaxdyn rl`.
      temperatures: to sample at, 0 being greedy; the configuration's own when not given.
      num_prompts: held-out prompts, the first of the test split (this and what follows: the
        configuration's own when not given).
      num_generations: completions a prompt.
      metrics: task metrics, named like reward functions; the first decides what is correct.
      pass_at: the k of pass@k and the N of best-of-N; else powers of two.
      success_threshold: the metric, or without metrics the reward, from which one is correct.
      seed: of the sampling.
      output: the JSON file to write; by default evaluation.json in RUN, with the step's number if
        one was given, or runs/evaluation.json for a --model.
    """

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    step: int | Literal["best"] | None = None
    model: str | None = None
    untie: bool = False
    config: str | None = None
    preset: str | None = None
    temperatures: tuple[float, ...] = ()
    num_prompts: int | None = None
    num_generations: int | None = None
    metrics: tuple[str, ...] | None = None
    pass_at: tuple[int, ...] | None = None
    success_threshold: float | None = None
    seed: int | None = None
    output: str | None = None

    def __post_init__(self):
        at_least(0, self, "", "step", "temperatures")
        at_least(0, self, "", "seed", most=LARGEST_SEED)
        at_least(1, self, "", "num_prompts", "num_generations", "pass_at", most=MOST_ROWS)
        finite(self, "", "success_threshold")
        if (self.run is None) == (self.model is None):
            raise JaxdynError("give a RUN or --model, " + ("not both" if self.run else "got none"))
        if self.model is None:
            given = [name for name in ("untie", "config", "preset") if getattr(self, name)]
            if given:
                raise JaxdynError(f"--{given[0]} goes with --model: a run has its own")
            return
        if self.step is not None:
            raise JaxdynError("--step is of a run: give RUN, not --model")
        if (self.config is None) == (self.preset is None):
            raise JaxdynError(
                "--model needs --config or --preset, for the prompts and the reward, "
                + ("not both" if self.config else "got none")
            )

    @property
    def destination(self) -> AnyPath:
        """Where the JSON goes."""
        if self.output is not None:
            return open_path(self.output)
        name = "evaluation" if self.step is None else f"evaluation-{self.step}"
        return open_path(self.run or "runs") / f"{name}.json"
