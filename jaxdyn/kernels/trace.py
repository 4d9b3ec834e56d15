r"""The kernel's trace over the whole vocabulary, exact, with d backward passes instead of V.

    tr Θ(s, s') = V ⟨φ, φ'⟩  +  tr(W J J'ᵀ Wᵀ)          (untied; a classifier bias adds V)

and tr(W J J'ᵀ Wᵀ) = tr(R J J'ᵀ Rᵀ) for every R with RᵀR = WᵀW: with the d×d factor R of W = QR it
is Σ_k ⟨Jᵀr_k, J'ᵀr_k⟩ over the d rows of R, the kernel of a model with d outputs.

Tied embeddings. The shared matrix's row v is reached by the logit v through the classifier (φ) and
through the embedding at the slots t with id_t = v; only logits of tokens in the context count. So
the cross component is φ·u' + u·φ' with u(s) = Σ_t J_tᵀ W_{id_t}, J_t = ∂φ(s)/∂(embedding at t):
T backward passes more, exact as well.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.blocks import (
    DEFAULT_BUDGET,
    assemble,
    attention_bytes,
    nbytes,
    tile_size,
    workspace_of,
)
from jaxdyn.kernels.empirical import model_itemsize
from jaxdyn.kernels.gram import Factors, Layout, body_kernels, layout_of, rows_first, stacked
from jaxdyn.kernels.plain import plain_kernels
from jaxdyn.kernels.sites import Rows, site_rows, with_chosen
from jaxdyn.types import Components, JaxdynError, Params, Sites

_AT_ONCE = 16
"""Rows of R pulled back together, at most: more make the products no faster."""


def trace_kernel(
    model: Any,
    params: Params,
    sites_a: Sites,
    sites_b: Sites | None = None,
    *,
    mean: bool = False,
    method: str = "auto",
    memory_budget: int | None = None,
) -> Components:
    """tr Θ(s_i, s'_j) over the vocabulary, [N, M] by component.

    Args:
      mean: divide by V, as neural-tangents does for its `trace_axes` (the "pseudo-NTK").
      method: "plain" contracts the whole Jacobians of all V logits; "gram", and "auto" always,
        takes the d×d route above.

    For the other arguments and what is raised see `log_prob_kernel`.
    """
    view = model.view(params)
    vocab, width = model.config.vocab_size, model.config.width
    rows = site_rows(model, sites_a, "sites_a")
    columns = None if sites_b is None else site_rows(model, sites_b, "sites_b")
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    scale = 1 / vocab if mean else 1
    if method not in ("auto", "plain", "gram"):
        raise JaxdynError(f"method must be 'auto', 'plain' or 'gram', got {method!r}")
    if method == "plain":
        kernels = _plain(model, view, rows, columns, budget)
    else:
        kernels = _gram(model, view, rows, columns, budget, width)
    return Components(*(jnp.asarray(scale * x) for x in kernels))


def _plain(model, view, rows, columns, budget):
    vocab = model.config.vocab_size
    count = len(rows.tokens) + (0 if columns is None else len(columns.tokens))
    if (needed := count * vocab * nbytes(view)) > budget:
        raise JaxdynError(
            f"method 'plain' holds {needed} bytes of Jacobians, and memory_budget is {budget}; "
            "method 'gram' holds none"
        )
    all_logits = lambda r: None if r is None else with_chosen(r, np.arange(vocab), vocab)
    representation, parts, cross = plain_kernels(model, view, all_logits(rows), all_logits(columns))
    gradient = sum(x.sum(axis=0) for x in parts.values())
    return [jnp.einsum("nkmk->nm", x) for x in (representation, gradient, cross)]


def _gram(model, view, rows, columns, budget, width):
    workspace = workspace_of(budget)
    pool = budget - workspace
    longest = max((r for r in (rows, columns) if r is not None), key=lambda r: r.tokens.shape[1])
    one = longest.take(0, 1)
    kept, pulled = jax.eval_shape(functools.partial(_shapes, model), view["backbone"], one)
    attention = attention_bytes(model.config, one.tokens.shape[1], model_itemsize(model))
    resident, each = 3 * nbytes(kept), 3 * nbytes(pulled) + attention
    counts = (len(rows.tokens), len(rows.tokens if columns is None else columns.tokens))
    size = tile_size(counts, columns is None, resident + each, pool)
    sides = 1 if columns is None and size == counts[0] else 2
    room = (pool // (sides * size) - resident) // each
    fitting = max(1, min(_AT_ONCE, room))
    tile = functools.partial(
        _trace_tile,
        model,
        view,
        _metric_factor(view["classifier"]["weight"]),
        layout=layout_of(view["backbone"]),
        at_once=max(k for k in range(1, fitting + 1) if width % k == 0),
        workspace=workspace,
    )
    kernels = assemble(rows, columns, size, lambda r: r, tile)
    return [x[:, 0, :, 0] for x in kernels]


@jax.jit
def _metric_factor(weight: jax.Array) -> jax.Array:
    """R [min(V, D), D] with RᵀR = WᵀW, padded with zero rows to [D, D]."""
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    r = jnp.linalg.qr(wide, mode="r")
    return jnp.pad(r, ((0, weight.shape[1] - r.shape[0]), (0, 0)))


def _shapes(model, backbone, rows):
    """What one row keeps, and what one of its backward passes returns."""
    phi, inputs, pull = model.opened(backbone, rows.tokens, rows.mask)
    return inputs, pull(phi)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("layout", "at_once", "workspace"))
def _trace_tile(
    model: Any,
    view: Params,
    metric_factor: jax.Array,
    rows: Rows,
    columns: Rows | None,
    *,
    layout: Layout,
    at_once: int,
    workspace: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three components' traces, [N, 1, M, 1]."""
    weight = view["classifier"]["weight"]
    left = _Opened(model, view["backbone"], rows)
    right = left if columns is None else _Opened(model, view["backbone"], columns)
    wide = metric_factor.dtype
    inner = lambda x, y: jnp.einsum("nd,md->nm", x, y, preferred_element_type=wide)
    boxed = lambda x: x[:, None, :, None]

    ones = 1.0 if model.config.classifier_bias else 0.0
    representation = weight.shape[0] * (inner(left.phi, right.phi) + ones)

    def step(total, block):
        others = None if columns is None else right.factors(block, layout)
        parts = body_kernels(layout, left.factors(block, layout), others, workspace)
        return total + sum(x.sum(axis=0) for x in parts.values()), None

    blocks = metric_factor.reshape(-1, at_once, metric_factor.shape[1])
    nothing = jnp.zeros_like(boxed(representation))
    gradient, _ = jax.lax.scan(step, nothing, blocks)

    cross = jnp.zeros_like(representation)
    if model.config.tied:
        u = left.own_embeddings(weight)
        v = u if columns is None else right.own_embeddings(weight)
        cross = inner(left.phi, v) + inner(u, right.phi)
    return boxed(representation), gradient, boxed(cross)


class _Opened:
    """Sites after one forward pass, ready for many backward passes."""

    def __init__(self, model, backbone, rows: Rows):
        phi, inputs, self.pull = model.opened(backbone, rows.tokens, rows.mask)
        self.tokens, self.inputs = jnp.asarray(rows.tokens), stacked(inputs)
        self.at = (jnp.arange(len(phi)), jnp.asarray(rows.positions)[:, 0])
        self.phi, self.still = phi[self.at], jnp.zeros_like(phi)

    def factors(self, block: jax.Array, layout: Layout) -> Factors:
        """Factors of the K functions r_kᵀφ, laid side by side so that products sum over k too."""
        many = len(block)
        start = lambda r: self.still.at[self.at].set(r[None].astype(self.still.dtype))
        cotangents = rows_first(jax.vmap(self.pull)(jax.vmap(start)(block)))
        # [L, N, K, T, O] -> [L, N, 1, T, K O]
        side = lambda x: jnp.moveaxis(x, 2, 3).reshape(*x.shape[:2], 1, x.shape[3], -1)
        repeat = lambda x: jnp.tile(x, (1, 1, 1, many))
        normalised = {path for path, names in layout if "scale" in names}
        return Factors(
            {path: repeat(x) if path in normalised else x for path, x in self.inputs.items()},
            {path: side(x) for path, x in cotangents.items()},
            None,
            None,
        )

    def own_embeddings(self, weight: jax.Array) -> jax.Array:
        """u = Σ_t J_tᵀ W_{id_t}, [N, D]."""

        def step(total, slot):
            own = weight[self.tokens[:, slot]].astype(self.still.dtype)
            back = self.pull(self.still.at[self.at].set(own))["embed"]
            return total + back[:, slot].astype(total.dtype), None

        start = jnp.zeros(self.phi.shape, jnp.promote_types(self.phi.dtype, jnp.float32))
        return jax.lax.scan(step, start, jnp.arange(self.tokens.shape[1]))[0]
