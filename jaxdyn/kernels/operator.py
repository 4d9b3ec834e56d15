r"""The kernel as a linear operator: Θ v as a pullback, then a pushforward, with no Θ formed.

A vector field gives every site a logit vector v_j. With D the Jacobian ∂f/∂θ at the sites,

    [Θ v]_i = Σ_j Θ(s_i, s'_j) v_j = D_i (D'ᵀ v),      D'ᵀ v = Σ_j (∂f(s'_j)/∂θ)ᵀ v_j,

one backward pass over the sequences of s' and one forward-mode pass over those of s; in between
lies a single vector of the parameters' size, which a preconditioner P multiplies: D P D'ᵀ v.

Tied embeddings. A change of the parameters is held *by path*, shaped as the view: the classifier's
weight has what came through the head, the embedding what came through the body. Pushed forward,

    representation = D_head Δ_head,   gradient = D_body Δ_body,
    cross          = D_head Δ_emb + D_emb Δ_head,

and the three sum to the whole, since the matrix is one and changes by Δ_head + Δ_emb.

Low-rank adapters are parameters like others. Of a classifier W + s B A the representation is then
the derivative along all of its leaves at fixed φ, s (δB A + B δA) φ where the adapter alone moves.
A kernel of adapters alone, W and the body's own weights frozen, has P = 0 at what is frozen.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdyn.kernels.branches import branched
from jaxdyn.kernels.execution import Execution, budget_of, require_options
from jaxdyn.kernels.memory import opened_bytes, rows_at_once
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.rows import site_rows
from jaxdyn.types import Branches, Components, JaxdynError, Model, Params, Sites, View


def site_features(model: Model, backbone: Params, sites: Sites) -> Float[Array, "N D"]:
    """φ at each site."""
    return model.features(backbone, sites.tokens, sites.mask)[sites.rows, sites.positions]


def pullback(model: Model, view: View, field: Float[Array, "N V"], sites: Sites) -> Params:
    """Dᵀ v = Σ_j (∂f(s_j)/∂θ)ᵀ v_j by path, shaped as the view."""

    def logits(view):
        return model.logits(view["classifier"], site_features(model, view["backbone"], sites))

    _, pull = jax.vjp(logits, view)
    return pull(field)[0]


def pushforward(
    model: Model, view: View, change: View, sites: Sites, by_path: bool = True
) -> tuple[Float[Array, "N D"], Components]:
    """φ [N, D] and D Δ [N, V] by component, for a change Δ shaped as the view.

    Of a tied matrix `change` has either the parts that came by each path, or not `by_path` the
    whole in both of its roles, which needs no cross component.
    """
    body = lambda psi: site_features(model.unfused, psi, sites)
    phi, along = jax.linearize(body, view["backbone"])
    head = view["classifier"]
    derivative = lambda f, at, tangent: jax.jvp(f, (at,), (tangent,))[1]
    through_head = lambda d_head: derivative(lambda w: model.logits(w, phi), head, d_head)
    through_body = lambda d_backbone: derivative(
        lambda x: model.logits(head, x), phi, along(d_backbone)
    )

    classifier, backbone = change["classifier"], change["backbone"]
    representation, gradient = through_head(classifier), through_body(backbone)
    cross = jnp.zeros_like(gradient)
    if model.config.tied and by_path:
        still = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        weight, embedding = classifier["weight"], backbone["embed"]["embedding"]
        cross = through_head({**still(classifier), "weight": embedding})
        cross += through_body({**still(backbone), "embed": {"embedding": weight}})
    return phi, Components(representation, gradient, cross)


def apply_kernel(
    model: Model,
    params: Params,
    sites_a: Sites,
    field: jax.Array | np.ndarray,
    sites_b: Sites | None = None,
    *,
    preconditioner: Params | None = None,
    **execution: Unpack[Execution],
) -> Kernel:
    """Σ_j Θ(s_i, s'_j) v_j, [N, V] by component, for a vector field v over `sites_b`.

    With v_j = η g_j it is the first-order change of the logits at `sites_a` when the parameters
    take a gradient step from `sites_b`. Every product is one of the model's own, in its precision;
    sums over batches are in float32 or better.

    Args:
      model: a `LanguageModel`.
      params: its parameters, as stored.
      sites_a: N sites; those of one sequence share its pass, and sequences of one prompt the
        prompt's.
      field: v [M, V], one logit vector a site of `sites_b`.
      sites_b: M sites; without them, `sites_a` again.
      preconditioner: P of the metric, shaped as the parameters, as `adam_preconditioner` gives it:
        the kernel is then D P D'ᵀ.
      execution: `memory_budget`, which sets how many sequences are taken at a time: see
        `Execution`. Beside it there are two more vectors of the parameters' size.

    Raises:
      JaxdynError: if the field is not [M, V], a site outside its sequence or on padding, a token id
        outside the vocabulary, a sequence longer than the context, the preconditioner negative or
        of other shapes, or the budget too small for one sequence.
    """
    rows = batches_of(model, sites_a, "sites_a", execution)
    columns = None if sites_b is None else batches_of(model, sites_b, "sites_b", execution)
    expected = (len((columns or rows).places), model.config.vocab_size)
    if np.shape(field) != expected:
        raise JaxdynError(f"field must be [M, V] = {expected}, got {np.shape(field)}")
    roots = roots_of(model, params, preconditioner)
    parts = apply(model, model.view(params), roots, rows, columns, jnp.asarray(field))
    return Kernel(
        parts.representation,
        parts.gradient,
        parts.cross,
        preconditioned=preconditioner is not None,
    )


class Batches(NamedTuple):
    """N sites in K batches of B sequences, S sites each.

    The last sequence and a batch's first site come again where a batch is not full.
    """

    sites: dict[str, Any]  # what `sites_of` takes: [K, B, T] and [K, S]
    numbers: Any  # which of the N sites, [K, S]
    real: Any  # whether it is there for the first time, [K, S]
    places: Any  # where among the K S places site n is, [N]


def batches_of(
    model: Model,
    sites: Sites,
    name: str,
    execution: Execution,
    bytes_each: Callable[[Model, int, int], int] | None = None,
    share: bool = True,
) -> Batches:
    """The sites by batches of their sequences; sequences without sites are left out.

    To `share`, those that begin with the same prompt become one that branches, where it fits.
    `bytes_each` is what a sequence of so many slots and sites takes, `sequence_bytes` by default.

    Raises:
      JaxdynError: if the budget is too small for one sequence, and as `site_rows`.
    """
    require_options(execution, "memory_budget")
    site_rows(model, sites, name)
    bytes_each = sequence_bytes if bytes_each is None else bytes_each

    def bytes_of(sites):
        return bytes_each(model, sites.tokens.shape[1], int(np.bincount(sites.rows).max()))

    joined = branched(sites) if share else sites
    sites = joined if bytes_of(joined) <= budget_of(execution) else sites
    used, row = np.unique(np.asarray(sites.rows), return_inverse=True)
    each = bytes_of(sites)
    size = rows_at_once("sequence", len(used), each, 0, budget_of(execution), model.row_shards)
    count = -(-len(used) // size)
    batch, row = np.divmod(row, size)

    # Sites in the order of their batches; a site's slot is its rank within its own.
    order = np.argsort(batch, kind="stable")
    held = np.bincount(batch)
    starts = np.cumsum(held) - held
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order)) - starts[batch[order]]
    numbers = np.repeat(order[starts][:, None], held.max(), axis=1)
    numbers[batch, slot] = np.arange(len(order))

    sequences = used[np.minimum(np.arange(count * size), len(used) - 1).reshape(count, size)]
    by_site = {name: np.asarray(getattr(sites, name)) for name in ("targets", "is_prompt")}
    by_site |= {"rows": row.astype(np.int32), "positions": np.asarray(sites.positions)}
    by_sequence = {"tokens": sites.tokens, "mask": sites.mask}
    if isinstance(sites.mask, Branches):
        branches = {"mask": sites.mask.prompt, "completions": sites.mask.completions}
        by_sequence |= branches
    return Batches(
        sites={name: np.asarray(x)[sequences] for name, x in by_sequence.items()}
        | {name: x[numbers] for name, x in by_site.items()},
        numbers=numbers,
        real=np.arange(held.max())[None] < held[:, None],
        places=batch * held.max() + slot,
    )


def sites_of(batch: dict[str, Any]) -> Sites:
    """A batch's sites from their arrays; where there are completions, the sequences branch."""
    fields = dict(batch)
    if "completions" in fields:
        fields["mask"] = Branches(fields["mask"], fields.pop("completions"))
    return Sites(**fields)


def sequence_bytes(model: Model, slots: int, most: int) -> int:
    """What a sequence of T slots and at most so many sites needs in the two passes of a product.

    By XLA's own account these take up to three quarters of what an opened row does (CPU, T from 64
    to 384, 2 and 6 layers), and less with rematerialisation; and logits four times.
    """
    wide = jnp.promote_types(model.dtype, jnp.float32)
    logits = most * model.config.vocab_size * wide.itemsize
    return sum(opened_bytes(model, slots)) * 9 // 10 + 4 * logits


@functools.partial(jax.jit, static_argnums=0)
def apply(
    model: Model,
    view: View,
    roots: Params | None,
    rows: Batches,
    columns: Batches | None,
    field: jax.Array,
) -> Components:
    """Θ v [N, V] by component; `roots` is √P, shaped as the view, and no columns are the rows."""
    columns = rows if columns is None else columns
    wide = lambda dtype: jnp.promote_types(dtype, jnp.float32)
    field = field.astype(wide(model.dtype))

    def pull(total, batch):
        sites, numbers, real = batch
        v = jnp.where(real[:, None], field[numbers], 0)
        return jax.tree.map(jnp.add, total, pullback(model, view, v, sites_of(sites))), None

    def push(_, sites):
        return None, pushforward(model, view, change, sites_of(sites))[1]

    still = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), view)
    change, _ = jax.lax.scan(pull, still, (columns.sites, columns.numbers, columns.real))
    if roots is not None:
        change = jax.tree.map(lambda x, r: x * r**2, change, roots)
    change = jax.tree.map(lambda x, like: x.astype(like.dtype), change, view)
    _, parts = jax.lax.scan(push, None, rows.sites)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[rows.places], parts)
