"""The options of `jaxdyn sketch`."""

import dataclasses
from typing import Literal

from jaxdyn.commands.text_options import TextOptions
from jaxdyn.grammar import at_least


@dataclasses.dataclass(frozen=True)
class SketchOptions(TextOptions):
    """Sketches of a model's gradients at places in your texts: a file of 8 R p² bytes a place, in
    which `jaxdyn influence --from-sketch` looks up who is nearest to other completions.

    Attributes:
      output: the directory to write.
      replicates: R, independent sketches of a gradient; their spread is the standard error.
      side: p, each of p² numbers. The error of ⟨g, g'⟩ is about ‖g‖ ‖g'‖ / √(R p²).
    """

    quantity: Literal["log_prob", "sequence"] = "log_prob"
    output: str = "runs/sketches"
    replicates: int = 32
    side: int = 8

    def __post_init__(self):
        super().__post_init__()
        at_least(2, self, "", "replicates", most=2**16)
        at_least(1, self, "", "side", most=2**10)
