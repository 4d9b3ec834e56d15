"""A reward that is a model's: where it comes from, and how it reads texts.

What computes it is not here, since rewards know nothing of models: `jaxdyn.train.scorer`.
"""

import dataclasses
from typing import Literal

from jaxdyn.grammar import MOST_ROWS, MOST_TOKENS, at_least


@dataclasses.dataclass(frozen=True)
class LearnedReward:
    """The scores of a reward model, which never moves.

    Attributes:
      path: its Hugging Face directory or hub name; its tokenizer need not be the policy's.
      dtype: it computes in this, and its matrices are held in it.
      batch_size: sequences scored at a time.
      max_length: longest prompt with its completion, in the model's tokens; its context when not
        given.
      overlong: of a longer one the beginning is cut (truncate-left), or it has no score (none), or
        it ends the run (error).
      prompt_template: how prompt and completion become a text, as data.prompt_template.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    max_length: int | None = None
    overlong: Literal["error", "none", "truncate-left"] = "error"
    prompt_template: Literal["auto", "chat", "plain", "hh", "alpaca", "none"] = "auto"

    def __post_init__(self):
        at_least(1, self, "reward.model/judge", "batch_size", most=MOST_ROWS)
        at_least(1, self, "reward.model/judge", "max_length", most=MOST_TOKENS)
