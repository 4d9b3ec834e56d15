"""What a kernel function returns, and how it is asked to run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import jax
from flax import struct

from jaxdyn.types import Components


@struct.dataclass
class Kernel(Components):
    """A kernel by component, and what else is known of it.

    `standard_error` is that of the total when an estimate is random, else None. `preconditioned`
    says that the parameters' metric is P, not the identity: the representation component at a pair
    of sites is then diag_k(Σ_j P_kj φ_j φ'_j) over the vocabulary, not ⟨φ, φ'⟩ I.
    """

    standard_error: jax.Array | None = None
    preconditioned: bool = struct.field(pytree_node=False, default=False)

    @property
    def representation_form(self) -> str:
        """ "scalar" where the representation component is a multiple of I, else "diagonal"."""
        return "diagonal" if self.preconditioned else "scalar"


class Execution(TypedDict, total=False):
    """How to compute a kernel; none of it changes the result beyond rounding.

    method: "plain" forms every row's whole gradient, "gram" never does, "auto" (the default) is
      plain where the gradients are tiny.
    memory_budget: bytes beside the parameters (twice, under a preconditioner) and the result, on
      each device; 4 GiB by default.
    devices: the devices to use; each holds a copy of the parameters and takes tiles of its own. By
      default the one that holds the parameters.
    progress: called with the number of finished tiles and of all, as each finishes.
    blocks: a directory that keeps finished tiles: the same call takes up those it finds there, a
      call for another kernel refuses it.
    """

    method: str
    memory_budget: int
    devices: Sequence[jax.Device]
    progress: Callable[[int, int], None]
    blocks: Path
