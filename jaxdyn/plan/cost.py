"""What a device does in a program: flops, bytes of memory, and bytes over the links."""

import dataclasses
from collections import Counter

from jaxdyn.plan.text import Number


@dataclasses.dataclass(frozen=True)
class Cost:
    """Flops, bytes and collectives of one device; see `jaxdyn.plan.hlo`.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read and written.
      sent: by ("all-reduce", devices a group), bytes that a device sends.
      moved: by the same, bytes of the whole arrays gathered, reduced, exchanged.
      uncounted: custom calls whose work is not known, by target, as often as they run.
    """

    flops: Number = 0
    bytes: Number = 0
    sent: Counter = dataclasses.field(default_factory=Counter)
    moved: Counter = dataclasses.field(default_factory=Counter)
    uncounted: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Cost(*(a + b for a, b in pairs))

    def times(self, count: Number) -> "Cost":
        scale = lambda x: Counter({k: v * count for k, v in x.items()})
        return Cost(
            self.flops * count,
            self.bytes * count,
            scale(self.sent),
            scale(self.moved),
            scale(self.uncounted),
        )

    @property
    def collective_bytes(self) -> Number:
        """Bytes that a device sends, in all."""
        return sum(self.sent.values())
