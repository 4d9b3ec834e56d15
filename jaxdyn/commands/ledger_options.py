"""The options of `jaxdyn ledger`, checked against each other before JAX is imported."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.commands.text_options import bytes_of
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, MOST_TOKENS, at_least, between

Quantity = Literal["log_prob", "entropy", "confidence", "margin", "kl"]


@dataclasses.dataclass(frozen=True)
class LedgerOptions:
    """What the training between two or more checkpoints did, exactly, part by part.

    Each checkpoint is a Hugging Face directory, a name on the hub, a run (all its kept
    checkpoints), RUN@STEP, or a PEFT adapter's directory, which is added to the first.

    Attributes:
      checkpoints: in their order: before, after, and more.
      prompts: the texts or messages, one JSON object a line, or a .parquet.
      output: the directory to write.
      prompt_field: the field that holds the prompt.
      prompt_template: how messages become a text, as data.prompt_template of a run.
      completion_field: the field that holds a completion, if there is one.
      sample: without it, who writes the completions: the first checkpoint, the last, or both.
      limit: use the first so many lines (0: all).
      max_prompt_length: longest prompt, in tokens; a longer one is refused.
      max_completion_length: completions end, or are cut, after so many tokens.
      temperature: of sampling; 0 is greedy.
      through: the straight line in parameters; or in features, which is quick and as exact, but
        another path, and knows no layers.
      by_layer: quantities to be split by layer and kind, summed over a completion.
      by_token: quantities to be split by layer at every token: a pass a layer.
      alternatives: other tokens to follow at each place, half of them raised, half lowered.
      tolerance: of the residual, relative to the change's root mean square.
      memory_budget: beside the parameters: 8GB, 512MiB or bytes.
      dtype: of the passes; with float64 the parameters are float64 too.
      seed: of sampling.
    """

    checkpoints: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")
    ]
    prompts: str
    output: str = "runs/ledger"
    prompt_field: str = "prompt"
    prompt_template: Literal["auto", "chat", "plain", "hh", "alpaca", "none"] = "auto"
    completion_field: str | None = None
    sample: Literal["first", "last", "both"] | None = None
    limit: int = 16
    max_prompt_length: int = 256
    max_completion_length: int = 64
    temperature: float = 1.0
    through: Literal["parameters", "features"] = "parameters"
    by_layer: tuple[Quantity, ...] = ("log_prob", "entropy")
    by_token: tuple[Quantity, ...] = ()
    alternatives: int = 8
    tolerance: float = 1e-4
    memory_budget: str = "4GiB"
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0

    def __post_init__(self):
        at_least(0, self, "", "limit", "alternatives", "temperature")
        at_least(0, self, "", "seed", most=LARGEST_SEED)
        at_least(1, self, "", "max_prompt_length", "max_completion_length", most=MOST_TOKENS)
        if self.alternatives % 2:
            raise JaxdynError(
                f"--alternatives are half raised, half lowered: an even number is wanted, got "
                f"{self.alternatives}"
            )
        between(0, 1, self, "", "tolerance", ends="()")
        if self.completion_field is not None and self.sample is not None:
            raise JaxdynError("give --completion-field or --sample, not both")
        bytes_of(self.memory_budget)
        if self.through == "features" and self.by_token:
            raise JaxdynError("--by-token is of --through parameters: features have no layers")

    @property
    def layered(self) -> tuple[str, ...]:
        """Quantities by layer, of which the path through features has none."""
        return self.by_layer if self.through == "parameters" else ()
