r"""The kernel's trace over the whole vocabulary, with d or fewer backward passes instead of V.

    tr Θ(s, s') = V ⟨φ, φ'⟩  +  tr(W J J'ᵀ Wᵀ)          (untied; a classifier bias adds V)

Exact: tr(W J J'ᵀ Wᵀ) = tr(R J J'ᵀ Rᵀ) for every R with RᵀR = WᵀW; with the d×d factor R of W = QR
it is Σ_k ⟨Jᵀr_k, J'ᵀr_k⟩ over the d rows of R, the kernel of a model with d outputs.

By probes: for signs ε ∈ {±1}^V, E[⟨JᵀWᵀε, J'ᵀWᵀε⟩] is the same trace (Hutchinson 1990), and the
mean over m independent draws has the standard error of a mean.

Tied embeddings. The shared matrix's row v is reached by the logit v through the classifier (φ) and
through the embedding at the slots t with id_t = v; only logits of tokens in the context count. So
the cross component is φ·u' + u·φ' with u(s) = Σ_t J_tᵀ W_{id_t}, J_t = ∂φ(s)/∂(embedding at t):
T backward passes more, exact as well. A probe's own pass gives Σ_t ε_{id_t} J_tᵀ Wᵀ ε, whose
expectation is u.

Under a preconditioner P, J is J √P, φ_j φ'_j has the weight Σ_k P_kj, and J_tᵀ W_{id_t} the weights
P_{id_t}.
"""

import functools
from pathlib import Path
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxdyn.hosts import fetch
from jaxdyn.kernels.blocks import (
    assemble,
    attention_bytes,
    budget_of,
    nbytes,
    tile_size,
    workspace_of,
)
from jaxdyn.kernels.contractions import PATHS, gradient_of
from jaxdyn.kernels.gram import Factors, body_kernels, factors_of, rows_first, stacked
from jaxdyn.kernels.parts import require_merged
from jaxdyn.kernels.plain import plain_kernels
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.result import Execution, Kernel
from jaxdyn.kernels.rows import Rows, site_rows, with_chosen
from jaxdyn.types import JaxdynError, Model, Params, Sites, View

_AT_ONCE = 16
"""Rows of R pulled back together, at most: more make the products no faster."""

_GROUP = 64
"""Passes after which a tile is finished as far as they go: they are progress, and are kept."""


class Pulled(NamedTuple):
    """What is pulled back through the body: rows of R, or probes.

    `signs` is None for rows of R [D, D]; for m probes Wᵀε [m, D] it holds their ε [m, V].
    """

    starts: jax.Array
    signs: jax.Array | None


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
    view, roots = model.view(params), roots_of(model, params, preconditioner)
    vocab = model.config.vocab_size
    rows = site_rows(model, sites_a, "sites_a")
    columns = None if sites_b is None else site_rows(model, sites_b, "sites_b")
    budget, method = budget_of(execution), execution.get("method", "auto")
    if method not in ("auto", "plain", "gram"):
        raise JaxdynError(f"method must be 'auto', 'plain' or 'gram', got {method!r}")
    if (num_probes is None) != (key is None):
        raise JaxdynError("num_probes and key go together; give both or neither")
    if num_probes is not None and num_probes < 2:
        raise JaxdynError(f"num_probes must be at least 2, for a standard error, got {num_probes}")
    scale = 1 / vocab if mean else 1
    scaled = lambda x: jnp.asarray(scale * x)
    if method == "plain":
        if num_probes is not None:
            raise JaxdynError("method 'plain' takes no probes; give method 'gram' or none")
        kernels = _plain(model, view, roots, rows, columns, budget)
    else:
        require_merged(params)
        weight = view["classifier"]["weight"]
        pulled = _metric_rows(weight) if num_probes is None else _probes(key, num_probes, weight)
        kernels = _gram(model, view, roots, rows, columns, pulled, budget, execution)
    error = scaled(np.sqrt(kernels["variance"])) if "variance" in kernels else None
    return Kernel(
        scaled(kernels["representation"]),
        scaled(kernels["gradient"]),
        scaled(kernels["cross"]),
        standard_error=error,
        preconditioned=preconditioner is not None,
    )


def _plain(model, view, roots, rows, columns, budget):
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


def _gram(model, view, roots, rows, columns, pulled, budget, execution):
    workspace, spare = workspace_of(budget)
    longest = max((r for r in (rows, columns) if r is not None), key=lambda r: r.tokens.shape[1])
    resident, each = row_bytes(model, longest.tokens.shape[1])
    counts = (len(rows.tokens), len(rows.tokens if columns is None else columns.tokens))
    pool = budget - spare
    size = tile_size(counts, columns is None, (resident + each), 0, pool)
    room = (pool // size // (1 if columns is None and size == counts[0] else 2) - resident) // each
    # One probe at a time: each is a sample, and the spread of the samples is the error.
    fitting = max(1, min(_AT_ONCE, room)) if pulled.signs is None else 1

    passes, kernels = len(pulled.starts), None
    groups = range(0, passes, _GROUP)
    for number, start in enumerate(groups):
        group = jax.tree.map(lambda x, start=start: x[start : start + _GROUP], pulled)
        many = len(group.starts)
        tile = functools.partial(
            _trace_tile,
            model,
            at_once=max(k for k in range(1, fitting + 1) if many % k == 0),
            first=start == 0,
            workspace=workspace,
        )
        found = assemble(
            f"trace {start} {passes} {model!r}",
            rows,
            columns,
            size,
            (view, roots, group),
            lambda operands, part: part,
            functools.partial(_unpacked, tile),
            _of_group(execution, number, len(groups)),
        )
        found = {name: x[:, 0, :, 0] for name, x in found.items()}
        kernels = found if kernels is None else _merged(kernels, start, found, many)
    assert kernels is not None
    if pulled.signs is not None:
        kernels["variance"] = kernels.pop("spread") / (passes * (passes - 1))
    return kernels


def _unpacked(tile, operands, left, right):
    return tile(*operands, left, right)


def _of_group(execution: Execution, number: int, count: int) -> Execution:
    """The same, with progress and finished tiles of one group of passes among `count`."""
    own = Execution(**execution)
    if "progress" in execution:
        own["progress"] = lambda done, tiles: execution["progress"](
            number * tiles + done, count * tiles
        )
    if "blocks" in execution:
        own["blocks"] = Path(execution["blocks"]) / f"passes_{number:03d}"
    return own


def _merged(kernels: dict, done: int, found: dict, more: int) -> dict:
    """Sums over passes add; means over `done` and `more` probes, and their spreads, combine."""
    if "spread" not in found:
        added = {name: kernels[name] + found[name] for name in ("gradient", "cross")}
        return {**kernels, **added}
    share = more / (done + more)
    shift = {name: found[name] - kernels[name] for name in ("gradient", "cross")}
    apart = (shift["gradient"] + shift["cross"]) ** 2 * done * share
    means = {name: kernels[name] + share * x for name, x in shift.items()}
    return {**kernels, **means, "spread": kernels["spread"] + found["spread"] + apart}


@functools.lru_cache
def row_bytes(model: Model, slots: int) -> tuple[int, int]:
    """What an opened row of T slots holds, and what one of its backward passes needs."""

    def shapes(key):
        tokens = jnp.zeros((1, slots), jnp.int32)
        phi, inputs, pull = model.opened(model.init(key)["backbone"], tokens, tokens == 0)
        return inputs, pull(phi)

    kept, pulled = jax.eval_shape(shapes, jax.random.key(0))
    of_forward, of_backward = attention_bytes(model, slots)
    return 3 * nbytes(kept) + of_forward, 3 * nbytes(pulled) + of_backward


@jax.jit
def _metric_rows(weight: jax.Array) -> Pulled:
    """R [min(V, D), D] with RᵀR = WᵀW, padded with zero rows to [D, D]."""
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    r = jnp.linalg.qr(wide, mode="r")
    return Pulled(jnp.pad(r, ((0, weight.shape[1] - r.shape[0]), (0, 0))), None)


@functools.partial(jax.jit, static_argnums=1)
def _probes(key: jax.Array, count: int, weight: jax.Array) -> Pulled:
    """Wᵀε of m draws of V signs."""
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    signs = jax.random.rademacher(key, (count, weight.shape[0]), wide.dtype)
    return Pulled(jnp.matmul(signs, wide, precision="highest"), signs)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("at_once", "first", "workspace"))
def _trace_tile(
    model: Model,
    view: View,
    roots: Params | None,
    pulled: Pulled,
    rows: Rows,
    columns: Rows | None,
    *,
    at_once: int,
    first: bool,
    workspace: int,
) -> dict[str, jax.Array]:
    """The components' traces [N, 1, M, 1]: sums over rows of R, or means over probes.

    Of probes also the spread, the total's sum of squared deviations. What no pass of R gives, the
    exact cross component, is in the `first` group's.
    """
    left = _Opened(model, view, roots, rows)
    right = left if columns is None else _Opened(model, view, roots, columns)
    wide = pulled.starts.dtype
    inner = lambda x, y: jnp.einsum(
        "nd,md->nm", x, y, precision="highest", preferred_element_type=wide
    )
    backbone, body_roots = view["backbone"], None if roots is None else roots["backbone"]

    unit = lambda x: jnp.ones(x.shape, wide)
    head = jax.tree.map(unit, view["classifier"]) if roots is None else roots["classifier"]
    weights = jnp.sum(head["weight"].astype(wide) ** 2, axis=0)
    representation = inner(left.phi * weights[None], right.phi)
    if model.config.classifier_bias:
        representation += jnp.sum(head["bias"].astype(wide) ** 2)

    def kernels(block):
        """The body's kernel of a block of backward passes, and both sides' embedding cotangents."""
        mine = left.factors(block)
        other = None if columns is None else right.factors(block)
        parts = body_kernels(mine, other, body_roots, backbone, workspace)
        gradient = gradient_of(parts)[:, 0, :, 0]
        return gradient, mine, mine if other is None else other

    nothing = jnp.zeros_like(representation)
    if pulled.signs is None:
        step = lambda total, block: (total + kernels(block)[0], None)
        blocks = pulled.starts.reshape(-1, at_once, pulled.starts.shape[1])
        gradient, cross = jax.lax.scan(step, nothing, blocks)[0], nothing
        if model.config.tied and first:
            u = left.own_embeddings()
            v = u if columns is None else right.own_embeddings()
            cross = inner(left.phi, v) + inner(u, right.phi)
        found = {"representation": representation, "gradient": gradient, "cross": cross}
        return {name: x[:, None, :, None] for name, x in found.items()}

    def probe(carry, drawn):
        count, gradient, cross, spread = carry
        start, signs = drawn
        own, mine, other = kernels(start[None])
        crossed = nothing
        if model.config.tied:
            u, v = left.signed_embeddings(mine, signs), right.signed_embeddings(other, signs)
            crossed = inner(left.phi, v) + inner(u, right.phi)
        # Welford's running mean and sum of squared deviations.
        count = count + 1
        step = own + crossed - gradient - cross
        gradient, cross = gradient + (own - gradient) / count, cross + (crossed - cross) / count
        spread = spread + step * (own + crossed - gradient - cross)
        return (count, gradient, cross, spread), None

    start = (jnp.zeros((), wide), nothing, nothing, nothing)
    (_, gradient, cross, spread), _ = jax.lax.scan(probe, start, tuple(pulled))
    found = {"representation": representation, "gradient": gradient, "cross": cross}
    found["spread"] = spread
    return {name: x[:, None, :, None] for name, x in found.items()}


class _Opened:
    """Sites after one forward pass, ready for many backward passes."""

    def __init__(self, model, view: View, roots: Params | None, rows: Rows):
        self.backbone, self.weight = view["backbone"], view["classifier"]["weight"]
        self.roots = None if roots is None else roots["backbone"]
        phi, inputs, self.pull = model.opened(self.backbone, rows.tokens, rows.mask)
        self.tokens, self.inputs = jnp.asarray(rows.tokens), stacked(inputs)
        self.at = (jnp.arange(len(phi)), jnp.asarray(rows.positions)[:, 0])
        self.phi, self.still = phi[self.at], jnp.zeros_like(phi)

    def factors(self, block: jax.Array) -> Factors:
        """Factors of K functions r_kᵀφ, laid side by side so that products sum over k too."""
        start = lambda r: self.still.at[self.at].set(r[None].astype(self.still.dtype))
        cotangents = rows_first(jax.vmap(self.pull)(jax.vmap(start)(block)))
        found = factors_of(self.backbone, self.inputs, cotangents, self.roots)
        # [L, N, K, (T,) O] -> [L, N, 1, (T,) K O]
        side = lambda x: jnp.moveaxis(x, 2, -2).reshape(*x.shape[:2], 1, *x.shape[3:-1], -1)
        return found._replace(
            cotangents=jax.tree.map(side, found.cotangents),
            vectors=jax.tree.map(side, found.vectors),
        )

    def own_embeddings(self) -> jax.Array:
        """u = Σ_t P_{id_t} J_tᵀ W_{id_t}, [N, D]."""

        def step(total, slot):
            own = self.weight[self.tokens[:, slot]].astype(self.still.dtype)
            back = self.pull(self.still.at[self.at].set(own))["embed"][:, slot]
            return total + self._weighted(back.astype(total.dtype), self.tokens[:, slot], 2), None

        start = jnp.zeros(self.phi.shape, jnp.promote_types(self.phi.dtype, jnp.float32))
        return jax.lax.scan(step, start, jnp.arange(self.tokens.shape[1]))[0]

    def signed_embeddings(self, factors: Factors, signs: jax.Array) -> jax.Array:
        """Σ_t ε_{id_t} P_{id_t} J_tᵀ Wᵀε of one probe, [N, D], from its factors (√P is in them)."""
        back = factors.cotangents[("embed",)][0][:, 0].astype(signs.dtype)
        return jnp.sum(signs[self.tokens][..., None] * self._weighted(back, self.tokens, 1), axis=1)

    def _weighted(self, x: jax.Array, ids: jax.Array, power: int) -> jax.Array:
        """x [..., D] times P^(power/2) of the table's rows `ids` [...]."""
        if self.roots is None:
            return x
        return x * self.roots["embed"]["embedding"][ids] ** power
