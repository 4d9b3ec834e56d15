"""What a kernel function returns."""

import jax
from flax import struct

from jaxdyn.types import Components


@struct.dataclass
class Kernel(Components):
    """A kernel by component, and what else is known of it.

    `standard_error` is that of the total when an estimate is random, else None. `preconditioned`
    says that the parameters' metric is P, not the identity: the representation component at a pair
    of sites is then diag_k(Σ_j P_kj φ_j φ'_j) over the vocabulary, not ⟨φ, φ'⟩ I.

    `parts`, where asked for, are the gradient component by kind of parameter and by layer:
    "attention", "mlp" and "norms", each [L, N, M]; "embedding" (of tokens, and of positions where
    they are learned) and "final_norm", each [1, N, M]. They add up to it.
    """

    standard_error: jax.Array | None = None
    preconditioned: bool = struct.field(pytree_node=False, default=False)
    parts: dict[str, jax.Array] | None = None

    @property
    def representation_form(self) -> str:
        """ "scalar" where the representation component is a multiple of I, else "diagonal"."""
        return "diagonal" if self.preconditioned else "scalar"
