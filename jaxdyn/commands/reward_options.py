"""The options of `jaxdyn reward score`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.grammar import at_least
from jaxdyn.sections import MeshConfig


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Score the rows of FILE by a reward model: prompt and completion, or pairs.

    Attributes:
      model: a reward model's Hugging Face directory or hub name, or a run of `jaxdyn reward`.
      file: JSON lines or Parquet: prompt and completion, or chosen and rejected, as TRL has them.
      output: the JSON lines to write: the file's rows, with their scores.
      limit: score the first rows alone; 0 for all.
      prompt_field: the field that holds the prompt.
      prompt_template: how a prompt and an answer become a text, as data.prompt_template.
      dtype: the model computes in this, and its matrices are held in it.
      batch_size: sequences scored at a time.
      max_length: longest prompt with its answer, in tokens; the model's context when not given.
      overlong: of a longer one the beginning is cut, or it has no score (none), or it is an error.
      template_date: what a template takes for today.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    output: str = "runs/scores.jsonl"
    limit: int = 0
    prompt_field: str = "prompt"
    prompt_template: Literal["auto", "chat", "plain", "hh", "alpaca", "none"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    max_length: int | None = None
    overlong: Literal["error", "none", "truncate-left"] = "error"
    template_date: str = "2024-07-26"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        at_least(0, self, "", "limit")
        at_least(1, self, "", "batch_size", "max_length")
