"""Which model, and which places in which texts: the options of commands that compare gradients."""

import dataclasses
import re
from typing import Literal

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, MOST_TOKENS, at_least
from jaxdyn.sections import MOST_DEVICES


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Places in texts, and the model.

    Attributes:
      prompts: the texts or messages, one JSON object a line, or a .parquet.
      model: a Hugging Face directory, or a hub name.
      run: instead, a directory of `jaxdyn rl`.
      step: with `run`, which checkpoint, or "best" (train.keep_best); the newest when not given.
      untie: with `model`, give a tied one a classifier of its own (a copy of the embedding).
      preconditioned: with `run`, measure in the metric of its Adam state: Θ_P = D P Dᵀ.
      prompt_field: the field that holds the prompt.
      prompt_template: how messages become a text, as data.prompt_template of a run.
      completion_field: the field that holds a completion, if there is one.
      limit: use the first so many lines (0: all).
      max_prompt_length: longest prompt, in tokens; a longer one is refused.
      max_completion_length: completions are cut after so many tokens.
      quantity: log_prob, the gradients of log π of each site's token; sequence, of whole
        completions.
      sites_per_completion: beside each prompt's last token, so many places inside its completion.
        A prompt's token is its completion's first or, without completions, the model's most likely.
      memory_budget: beside the parameters and the result, on each device: 8GB, 512MiB or bytes.
      fsdp: divide the model, and the rows, among so many devices.
      tensor: and its heads and vocabulary among so many. A run's model lies on the run's own mesh.
      dtype: compute dtype; with float64 the parameters are float64 too.
      seed: of the places inside completions, and of what is random.
    """

    prompts: str
    model: str | None = None
    run: str | None = None
    step: int | Literal["best"] | None = None
    untie: bool = False
    preconditioned: bool = False
    prompt_field: str = "prompt"
    prompt_template: Literal["auto", "chat", "plain", "hh", "alpaca", "none"] = "auto"
    completion_field: str | None = None
    limit: int = 64
    max_prompt_length: int = 256
    max_completion_length: int = 64
    quantity: Literal["log_prob", "trace", "sequence"] = "log_prob"
    sites_per_completion: int = 0
    memory_budget: str = "4GiB"
    fsdp: int = 1
    tensor: int = 1
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    seed: int = 0

    def __post_init__(self):
        at_least(0, self, "", "limit", "sites_per_completion", "step")
        at_least(0, self, "", "seed", most=LARGEST_SEED)
        at_least(1, self, "", "fsdp", "tensor", most=MOST_DEVICES)
        at_least(1, self, "", "max_prompt_length", "max_completion_length", most=MOST_TOKENS)
        if (self.model is None) == (self.run is None):
            raise JaxdynError("give --model or --run, " + ("not both" if self.run else "got none"))
        if self.fsdp * self.tensor > 1 and self.run is not None:
            raise JaxdynError("--fsdp and --tensor go with --model and without --run")
        if self.run is None and (self.preconditioned or self.step is not None):
            name = "preconditioned" if self.preconditioned else "step"
            raise JaxdynError(f"--{name} is of a run: give --run, not --model")
        if self.run is not None and self.untie:
            raise JaxdynError("--untie goes with --model: a run's model is as it was trained")
        if self.completion_field is None:
            if self.quantity == "sequence":
                raise JaxdynError("--quantity sequence needs completions: give --completion-field")
            if self.sites_per_completion:
                raise JaxdynError(
                    "--sites-per-completion needs completions: give --completion-field"
                )
        elif self.quantity == "sequence" and self.sites_per_completion:
            raise JaxdynError(
                "--quantity sequence takes whole completions; leave --sites-per-completion out"
            )
        bytes_of(self.memory_budget)


def bytes_of(text: str) -> int:
    """8GB, 512MiB or 4096: a positive number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    size = 0
    if match:
        power = " kmgt".index(match[2] or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise JaxdynError(f"memory_budget must be a size as 8GB, 512MiB or 4096, got {text!r}")
    return size
