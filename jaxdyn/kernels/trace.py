r"""The kernel's trace over the whole vocabulary, with d or fewer backward passes instead of V.

    tr Θ(s, s') = V ⟨φ, φ'⟩  +  tr(W J J'ᵀ Wᵀ)          (untied; a classifier bias adds V)

Tied embeddings. The shared matrix's row v is reached by the logit v through the classifier (φ) and
through the embedding at the slots t with id_t = v; only logits of tokens in the context count. So
the cross component is φ·u' + u·φ' with u(s) = Σ_t J_tᵀ W_{id_t}, J_t = ∂φ(s)/∂(embedding at t).

Under a preconditioner P, J is J √P, φ_j φ'_j has the weight Σ_k P_kj, and J_tᵀ W_{id_t} the weights
P_{id_t}. The gradient and cross components are exact (`trace_exact`) or estimated (`trace_probed`).
"""

from typing import Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxdyn.hosts import fetch
from jaxdyn.kernels.contractions import PATHS, gradient_of
from jaxdyn.kernels.execution import Execution, budget_of, method_of, require_options
from jaxdyn.kernels.memory import nbytes
from jaxdyn.kernels.parts import require_merged
from jaxdyn.kernels.passes import Traced
from jaxdyn.kernels.plain import plain_kernels
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.rows import site_rows, with_chosen
from jaxdyn.kernels.trace_exact import exact_traces
from jaxdyn.kernels.trace_probed import probed_traces
from jaxdyn.types import COMPONENTS, JaxdynError, Model, Params, Sites


def trace_kernel(
    model: Model,
    params: Params,
    sites_a: Sites,
    sites_b: Sites | None = None,
    *,
    mean: bool = False,
    num_probes: int | None = None,
    key: PRNGKeyArray | None = None,
    preconditioner: Params | None = None,
    **execution: Unpack[Execution],
) -> Kernel:
    """tr Θ(s_i, s'_j) over the vocabulary, [N, M] by component.

    Args:
      mean: divide by V, as neural-tangents does for its `trace_axes` (the "pseudo-NTK").
      num_probes: m, two or more: estimate the gradient and cross components from m random probes,
        without bias, m backward passes instead of d (and T). The result's `standard_error` [N, M]
        is then that of the total, from the probes' spread. All entries share the probes, so their
        errors go together. The representation component is exact either way.
      key: of the probes.

    Method "plain" contracts the whole Jacobians of all V logits; "gram", and "auto" always, takes
    the route above. For the other arguments and what is raised see `log_prob_kernel`.
    """
    require_options(execution)
    view, roots = model.view(params), roots_of(model, params, preconditioner)
    rows = site_rows(model, sites_a, "sites_a")
    columns = None if sites_b is None else site_rows(model, sites_b, "sites_b")
    method = method_of(execution)
    if (num_probes is None) != (key is None):
        raise JaxdynError("num_probes and key go together; give both or neither")
    if num_probes is not None and num_probes < 2:
        raise JaxdynError(f"num_probes must be at least 2, for a standard error, got {num_probes}")
    if method == "plain":
        if num_probes is not None:
            raise JaxdynError("method 'plain' takes no probes; give method 'gram' or none")
        kernels = _plain(model, view, roots, rows, columns, budget_of(execution))
    else:
        require_merged(params)
        given = Traced(model, view, roots, rows, columns)
        if num_probes is None or key is None:
            kernels = exact_traces(given, execution)
        else:
            kernels = probed_traces(given, key, num_probes, execution)
    scale = 1 / model.config.vocab_size if mean else 1
    scaled = lambda x: jnp.asarray(scale * x)
    error = scaled(np.sqrt(kernels["variance"])) if "variance" in kernels else None
    representation, gradient, cross = (scaled(kernels[part]) for part in COMPONENTS)
    return Kernel(representation, gradient, cross, error, preconditioner is not None)


def _plain(model, view, roots, rows, columns, budget) -> dict[str, np.ndarray]:
    vocab = model.config.vocab_size
    count = len(rows.tokens) + (0 if columns is None else len(columns.tokens))
    if (needed := count * vocab * nbytes(view)) > budget:
        raise JaxdynError(
            f"method 'plain' holds {needed} bytes of Jacobians, and memory_budget is {budget}; "
            "method 'gram' holds none"
        )
    every = lambda r: None if r is None else with_chosen(r, np.arange(vocab), vocab)
    kernels = fetch(plain_kernels(model, view, roots, every(rows), every(columns)))
    kernels["gradient"] = gradient_of(kernels)
    return {name: np.einsum("nkmk->nm", kernels[name]) for name in (*PATHS, "gradient")}
