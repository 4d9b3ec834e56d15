"""The empirical NTK of a language model, by component, at its real size."""

from jaxdyn.kernels.contractions import (
    log_prob_kernel,
    policy_kernel,
    sequence_kernel,
    token_block,
    update_kernel,
)
from jaxdyn.kernels.eigenpairs import Eigenpairs, top_eigenpairs
from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.nearest import Nearest, nearest_sketches
from jaxdyn.kernels.operator import apply_kernel
from jaxdyn.kernels.preconditioner import adam_preconditioner
from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.sketch import Sketch, sketch_gradients, sketch_kernel, sketch_sequences
from jaxdyn.kernels.sketch_file import SketchFile, open_sketches, store_sketches
from jaxdyn.kernels.statistics import (
    InnerProducts,
    alignment,
    component_shares,
    debiased_cka,
    debiased_hsic,
    effective_rank,
    inner_products,
    kernel_distance,
    participation_ratio,
    spectrum,
)
from jaxdyn.kernels.summary import summarize
from jaxdyn.kernels.trace import trace_kernel
