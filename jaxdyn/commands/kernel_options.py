"""The options of `jaxdyn kernel`, checked against each other before JAX is imported."""

import dataclasses
from typing import Literal

from jaxdyn.commands.text_options import TextOptions
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import at_least
from jaxdyn.sections import MOST_DEVICES

NATS = "nats per unit of learning rate × advantage"
ENTRIES = {  # what an entry of the kernel is, and its unit
    "log_prob": ("⟨∇ log π(y | s), ∇ log π(y' | s')⟩", NATS),
    "sequence": ("⟨∇ log π(completion), ∇ log π(completion')⟩, sums over tokens", NATS),
    "trace": ("tr Θ(s, s'), summed over the vocabulary", "logits per unit of learning rate"),
    "mean": ("tr Θ(s, s') / V, mean over the vocabulary", "logits per unit of learning rate"),
}


@dataclasses.dataclass(frozen=True)
class KernelOptions(TextOptions):
    """The kernel of a model between places in your texts: a file and a picture.

    Attributes:
      output: the directory to write.
      quantity: log_prob, the gradients of log π of each site's token; trace, of all logits;
        sequence, of whole completions.
      by_part: log_prob's gradient component also by layer, attention, mlp, norms and embedding.
      mean: trace: divide by the vocabulary's size.
      num_probes: trace: estimate it from so many random probes, with a standard error.
      method: plain holds every gradient, gram holds none, auto is plain where they are tiny.
      devices: how many of this host's devices to use (0: all); each holds a copy of the model.
    """

    output: str = "runs/kernel"
    by_part: bool = False
    mean: bool = False
    num_probes: int | None = None
    method: Literal["auto", "plain", "gram"] = "auto"
    devices: int = 1

    def __post_init__(self):
        super().__post_init__()
        at_least(0, self, "", "devices", most=MOST_DEVICES)
        at_least(1, self, "", "num_probes", most=2**20)
        if self.fsdp * self.tensor > 1 and self.devices != 1:
            raise JaxdynError(
                f"--fsdp and --tensor go with --model and without --devices {self.devices}"
            )
        for name, wanted in (("mean", "trace"), ("num_probes", "trace"), ("by_part", "log_prob")):
            given = getattr(self, name)
            if given is not None and given is not False and self.quantity != wanted:
                option = f"--{name.replace('_', '-')}"
                raise JaxdynError(f"{option} is of --quantity {wanted}, got {self.quantity}")

    @property
    def described(self) -> tuple[str, str]:
        """What an entry of the kernel is, and its unit."""
        return ENTRIES["mean" if self.mean else self.quantity]
