r"""Sketches: a few thousand numbers a site, whose inner products estimate those of its gradients.

A site's gradient is one block-diagonal matrix G, a block Σ_t δ_t a_tᵀ for every matrix of the
model. Replicate r of its sketch is, with independent signs S_r and Q_r (E[SSᵀ] = E[QQᵀ] = I),

    Z_r = S_rᵀ G Q_r = Σ_layers Σ_t (S_rᵀ δ_t) (Q_rᵀ a_t)ᵀ,   p × p,   S, Q ∈ {±1/√p},

from the factors, so that no gradient is formed, and R p² numbers a site whatever the model's size.
A layer's vectors (norm scales, biases), side by side, are a block of their own, laid out as a
square. Then E⟨Z_r, Z'_r⟩ = ⟨G, G'⟩; the mean over the R replicates estimates it, and their spread
gives the standard error.

The relative variance of a squared norm, with ρ = ‖GᵀG‖²_F / ‖G‖⁴_F between 1/rank G and 1, is

    Var⟨Z, Z⟩ / ‖G‖⁴_F  ≤  (2/p² + (4/p + 2/p²) ρ) / R

with equality for Gaussian entries (the law of total variance, and E[WMW] = (1 + 1/p) M + tr(M) I/p
of W = QQᵀ and M = GᵀG). Signs take off, in units of ‖G‖⁴_F / R,

    (2/p)(1 + 2/p) (Σ_i (GᵀG)_ii² + Σ_k (GGᵀ)_kk²) − (4/p²) Σ_ki G_ki⁴,

little where no row, column or entry stands out. At rank one the bound is ((1 + 2/p)² − 1)/R =
4 (p + 1)/(R p²): for a given storage R p² many small replicates are best, for a given work R p few
large ones. For rank-one G = u vᵀ and G' = u' v'ᵀ it is exactly

    Var⟨Z, Z'⟩ = ((c² + σ²)(d² + τ²) − c² d²) / R,   c = u·u', d = v·v',
    σ² = (‖u‖² ‖u'‖² + c² − 2 Σ_k u_k² u'_k²) / p,   τ² the same of v, v'.

(The separable projection of a layer's factors: Choe et al. 2024, arXiv 2405.13954; the replicates
and their variance are ours.) The mean's Gram matrix is Z Zᵀ/R with Z [N, R p²]: beyond N = R p² its
spectrum is cheaper from Zᵀ Z/R.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import PRNGKeyArray

from jaxdyn.hosts import fetch
from jaxdyn.kernels.execution import Execution, budget_of, platform_of, require_options
from jaxdyn.kernels.gram import factorize, row_bytes
from jaxdyn.kernels.layers import product
from jaxdyn.kernels.memory import evenly, rows_at_once
from jaxdyn.kernels.parts import require_merged
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.projection import SIGN_ROWS, draw_signs, sketch_factors
from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.rows import Rows, sequence_rows, site_rows, with_cotangents
from jaxdyn.types import JaxdynError, Model, Params, Rollout, Sites, View

NEAR = 400
"""Slots of a batch on a CPU, at most, or one row: more fall out of a core's caches."""


@struct.dataclass
class Sketch:
    """Sketches of N gradients: through the classifier (`head`) and the backbone (`body`).

    Both are [N, R, p²]. `key` are two words that stand for the projections, and may be given for a
    key; sketches compare where these, the sizes and the model's configuration agree (the
    parameters' values may differ).
    """

    head: jax.Array
    body: jax.Array
    key: tuple[int, int] = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)
    preconditioned: bool = struct.field(pytree_node=False, default=False)

    def __len__(self) -> int:
        """N."""
        return len(self.head)

    def take(self, which: Any) -> "Sketch":
        """The sketches numbered `which`, a slice or a list of indices."""
        return dataclasses.replace(self, head=self.head[which], body=self.body[which])

    @staticmethod
    def concatenate(sketches: Sequence["Sketch"]) -> "Sketch":
        """One after another.

        Raises:
          JaxdynError: if there is none, or two of them do not compare.
        """
        if not sketches:
            raise JaxdynError("there must be at least one sketch to concatenate, got none")
        for other in sketches[1:]:
            require_comparable(sketches[0], other)
        joined = lambda name: jnp.concatenate([getattr(s, name) for s in sketches])
        return dataclasses.replace(sketches[0], head=joined("head"), body=joined("body"))


def sketch_gradients(
    model: Model,
    params: Params,
    sites: Sites,
    key: PRNGKeyArray | tuple[int, int],
    *,
    cotangents: jax.Array | None = None,
    preconditioner: Params | None = None,
    replicates: int = 64,
    side: int = 8,
    **execution: Unpack[Execution],
) -> Sketch:
    """Z_r of ∇ log π(y_n | s_n), or of ∇ g_nᵀ f(s_n), for N sites.

    The same key gives the same projections for any sites, so separate calls compare. The work is
    one forward and one backward pass a site and 2 T R p (I + O) products for every matrix [I, O].

    Args:
      model: a `LanguageModel`.
      params: its parameters, as stored.
      sites: N sites.
      key: of the signs, or the `key` of sketches that these are to compare with.
      cotangents: g [N, V], one a site, in place of e_y − π.
      preconditioner: P of the metric, shaped as the parameters: √P ⊙ gradients are sketched. Then
        every matrix's gradient is formed, some outputs at a time, with 2 R p products for each of
        its entries: at short contexts a few times the work.
      replicates: R, two or more.
      side: p.
      execution: `memory_budget`, which sets how many sites are taken at a time, and `progress`: see
        `Execution`.

    Raises:
      JaxdynError: if a site is outside its sequence or on padding, a token id outside the
        vocabulary, a sequence longer than the context, the cotangents or the preconditioner of
        another shape, R or p too small, or the budget too small for one site.
    """
    rows = site_rows(model, sites, "sites")
    if cotangents is not None:
        rows = with_cotangents(rows, cotangents, model.config.vocab_size, "cotangents")
    return _sketch(model, params, rows, key, preconditioner, replicates, side, execution)


def sketch_sequences(
    model: Model,
    params: Params,
    rollout: Rollout,
    key: PRNGKeyArray | tuple[int, int],
    *,
    weights: jax.Array | None = None,
    preconditioner: Params | None = None,
    replicates: int = 64,
    side: int = 8,
    **execution: Unpack[Execution],
) -> Sketch:
    """Z_r of ∇ Σ_c w_bc log π(y_bc) for B completions: the weighted sum of their sites' sketches.

    Args:
      rollout: B prompts with their completions.
      weights: w [B, C], 1 without them; slots outside the completion do not count.

    For the other arguments and what is raised see `sketch_gradients`.
    """
    rows = sequence_rows(model, rollout, weights, "rollout")
    return _sketch(model, params, rows, key, preconditioner, replicates, side, execution)


def sketch_kernel(a: Sketch, b: Sketch | None = None) -> Kernel:
    """⟨g_i, g'_j⟩ estimated without bias from sketches, [N, M] by component.

    The cross component is ⟨Z^head, Z'^body⟩ + ⟨Z^body, Z'^head⟩ of a tied model and zero of an
    untied one. `standard_error` is that of the total: the replicates' standard deviation over √R.
    All entries share the projections, so their errors go together.

    Args:
      a: N sketches.
      b: M sketches; without them, `a` again.

    Raises:
      JaxdynError: if the two were made with other keys, sizes or models.
    """
    b = a if b is None else b
    require_comparable(a, b)
    *parts, error = estimate((a.head, a.body), (b.head, b.body), tied=a.config.tied)
    representation, gradient, cross = parts
    return Kernel(representation, gradient, cross, error, a.preconditioned)


@functools.partial(jax.jit, static_argnames="tied")
def estimate(left, right, *, tied: bool) -> tuple[jax.Array, ...]:
    """The three components [N, M] and the total's standard error, of (head, body) pairs."""
    (head, body), (other_head, other_body) = left, right
    count = head.shape[1]
    inner = lambda x, y: product("nrk,mrk->nm", x, y) / count
    representation, gradient = inner(head, other_head), inner(body, other_body)
    cross = jnp.zeros_like(gradient)
    if tied:
        cross = inner(head, other_body) + inner(body, other_head)

    # A tied model's paths share parameters and their sketches add; an untied one's lie beside.
    whole = jnp.add if tied else lambda *paths: jnp.concatenate(paths, axis=-1)
    mean = representation + gradient + cross

    def step(spread, pair):
        return spread + (product("nk,mk->nm", *pair) - mean) ** 2, None

    replicates = [jnp.moveaxis(whole(*paths), 1, 0) for paths in (left, right)]
    spread, _ = jax.lax.scan(step, jnp.zeros_like(mean), tuple(replicates))
    return representation, gradient, cross, jnp.sqrt(spread / (count * (count - 1)))


@functools.partial(jax.jit, static_argnames=("model", "replicates", "side"))
def _sketch_rows(model, view: View, roots, signs, rows: Rows, *, replicates: int, side: int):
    factors = factorize(model, view, roots, rows)
    return sketch_factors(signs, factors, model.config, replicates, side, roots)


def _sketch(model, params, rows, key, preconditioner, replicates, side, execution) -> Sketch:
    require_options(execution, "memory_budget", "progress")
    words = words_of(key)
    how = preconditioner, replicates, side, execution
    found = list(sketched(model, params, rows, words, *how))
    head, body = (jnp.asarray(np.concatenate(parts)) for parts in zip(*found, strict=True))
    return Sketch(head, body, words, model.config, preconditioner is not None)


def sketched(
    model: Model,
    params: Params,
    rows: Rows,
    words: tuple[int, int],
    preconditioner: Params | None,
    replicates: int,
    side: int,
    execution: Execution,
    start: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows' sketches from the row `start` on, (head, body) of as many as fit at a time."""
    if replicates < 2:
        raise JaxdynError(f"replicates must be at least 2, for a standard error, got {replicates}")
    if side < 1:
        raise JaxdynError(f"side must be at least 1, got {side}")
    require_merged(params)
    count, view = len(rows.tokens), model.view(params)
    roots = roots_of(model, params, preconditioner)
    size, threads = _rows_at_once(model, rows, replicates, side, budget_of(execution)), 1
    if platform_of(execution, view) == "cpu" and model.row_shards == jax.process_count() == 1:
        near = evenly(count, min(size, max(1, NEAR // rows.tokens.shape[1])))
        size, threads = near, min(_cores(), size // near)
    # A generator of our own: others draw otherwise when they draw for several rows at once.
    own = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
    signs = draw_signs(own, view, model.config, replicates * side)

    run = functools.partial(_sketch_rows, model, view, roots, signs)
    wide = jax.config.read("jax_enable_x64")

    def batch(first):
        with jax.enable_x64(wide):  # a thread does not know
            return fetch(run(rows.take(first, size), replicates=replicates, side=side))

    progress = execution.get("progress", lambda done, total: None)
    starts = range(start, count, size)
    done, batches = -(-count // size) - len(starts), -(-count // size)
    for first, part in zip(starts, _in_order(batch, starts, threads), strict=True):
        yield jax.tree.map(lambda x, rest=count - first: x[:rest], part)
        done += 1
        progress(done, batches)  # once they have been taken up


def _cores() -> int:
    """Which this process may use, where the system tells; else all."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _in_order(function: Callable, given: Iterable, threads: int) -> Iterator:
    """The function's results in their order, found by so many threads at a time."""
    if threads == 1:
        yield from map(function, given)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        begun: collections.deque = collections.deque()
        for one in given:
            begun.append(pool.submit(function, one))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def words_of(key: PRNGKeyArray | tuple[int, int]) -> tuple[int, int]:
    """The two words that stand for a key's projections."""
    if isinstance(key, tuple):
        return key
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    return int(first), int(second)


def _rows_at_once(model, rows: Rows, replicates: int, side: int, budget: int) -> int:
    """A batch that fits, by which the rows are divided evenly."""
    slots, counted, count = rows.tokens.shape[1], rows.positions.shape[1], len(rows.tokens)
    itemsize = jnp.promote_types(model.dtype, jnp.float32).itemsize
    signs = 3 * SIGN_ROWS * replicates * side * itemsize
    projected = (4 * max(slots, counted) + 3 * side) * replicates * side * itemsize
    each = sum(row_bytes(model, slots, counted, 1)) + projected
    return rows_at_once("row", count, each, signs, budget, model.row_shards)


def require_comparable(a: Sketch, b: Sketch) -> None:
    """JaxdynError, saying why, if the inner products of two sets of sketches mean nothing."""
    if a.head.shape[1:] != b.head.shape[1:]:
        sizes = [(s.head.shape[1], math.isqrt(s.head.shape[2])) for s in (a, b)]
        raise JaxdynError(
            "sketches compare only with the same replicates and side, "
            f"got {sizes[0]} and {sizes[1]}"
        )
    if a.key != b.key:
        raise JaxdynError(f"sketches compare only with the same key, got {a.key} and {b.key}")
    if a.preconditioned != b.preconditioned:
        raise JaxdynError("sketches compare only in one metric: one is preconditioned, one is not")
    if a.config != b.config:
        raise JaxdynError("sketches compare only with the same model configuration, got two")
