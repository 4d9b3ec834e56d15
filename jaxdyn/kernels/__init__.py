"""The empirical NTK of a language model, by component, at its real size."""

from jaxdyn.kernels.empirical import (
    log_prob_kernel,
    sequence_kernel,
    token_block,
    update_kernel,
    update_kernel_by_part,
)
from jaxdyn.kernels.trace import trace_kernel

__all__ = [
    "log_prob_kernel",
    "sequence_kernel",
    "token_block",
    "trace_kernel",
    "update_kernel",
    "update_kernel_by_part",
]
