r"""The empirical NTK between sites, contracted with logit cotangents, by component.

With Θ(s, s') = (∂f(s)/∂θ)(∂f(s')/∂θ)ᵀ, all that is here is g_iᵀ Θ(s_i, s'_j) g'_j for some g:

    Θ(s, s') = ⟨φ(s), φ(s')⟩ I   +   W J(s) J(s')ᵀ Wᵀ   +   the tied matrix's cross products
               └ representation ┘    └ gradient ┘           └ cross ┘

(Tomihari 2026, arXiv 2601.04670, the NTK's decomposition; a classifier bias adds 1 to ⟨φ, φ'⟩, and
the tied case is ours). In a preconditioner's metric Θ_P = D P D'ᵀ and ⟨φ, φ'⟩ I is the diagonal
[Σ_j P_kj φ_j φ'_j]_k. Two methods: "plain" forms every row's whole gradient; "gram" never does
(`jaxdyn.kernels.gram`). "auto" is plain where the gradients are small, or where adapters are, which
"gram" cannot follow. Gradients are of what a metric moves.

These functions run on the host, tile by tile: they are not to be called inside `jax.jit`.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdyn.hosts import fetch
from jaxdyn.kernels.blocks import Tiling, assemble, tiling, turns
from jaxdyn.kernels.execution import (
    Execution,
    budget_of,
    method_of,
    platform_of,
    require_options,
)
from jaxdyn.kernels.gram import contract, factorize, row_bytes
from jaxdyn.kernels.parts import has_adapters, require_merged
from jaxdyn.kernels.plain import moving_leaves, plain_kernels
from jaxdyn.kernels.preconditioner import roots_of
from jaxdyn.kernels.result import Kernel
from jaxdyn.kernels.rows import (
    Rows,
    sequence_rows,
    site_rows,
    token_rows,
    with_both,
    with_chosen,
    with_cotangents,
)
from jaxdyn.kernels.streams import Side, contract_streams, stream, stream_bytes
from jaxdyn.types import JaxdynError, Model, Params, Rollout, Sites

PATHS = ("representation", "cross")
"""What is not of the gradient component among an engine's results."""

TINY = 16 * 2**20
"""Bytes of gradients up to which "auto" takes the plain method."""


def log_prob_kernel(
    model: Model,
    params: Params,
    sites_a: Sites,
    sites_b: Sites | None = None,
    *,
    preconditioner: Params | None = None,
    by_part: bool = False,
    **execution: Unpack[Execution],
) -> Kernel:
    """⟨∇ log π(y_i | s_i), ∇ log π(y'_j | s'_j)⟩ of the sites' targets, [N, M] by component.

    The case g = e_y − π of `update_kernel`. Entry (i, j), times a learning rate and an advantage,
    is the first-order change of log π(y_i | s_i), in nats, when y'_j is reinforced at s'_j.

    Args:
      model: a `LanguageModel`.
      params: its parameters, as stored.
      sites_a: N sites.
      sites_b: M sites, in sequences of any length; without them, `sites_a` again.
      preconditioner: P of the metric, shaped as the parameters, as `adam_preconditioner` gives it:
        the kernel is then D P D'ᵀ.
      by_part: keep the gradient component by kind and layer too, as the kernel's `parts`; it is
        computed so, and costs no more.
      execution: `method`, `memory_budget`, `devices`, `progress`, `blocks`: see `Execution`.

    Raises:
      JaxdynError: if a site is outside its sequence or on padding, a token id outside the
        vocabulary, a sequence longer than the context, the preconditioner of other shapes, the
        budget too small for one site, or `blocks` a directory of another kernel.
    """
    rows, columns = _both(model, sites_a, sites_b)
    kernels = _kernels("log_prob", model, params, rows, columns, preconditioner, execution)
    return _kernel(kernels, preconditioner, _scalars, by_part)


def update_kernel(
    model: Model,
    params: Params,
    sites_a: Sites,
    sites_b: Sites | None = None,
    *,
    cotangents_a: jax.Array,
    cotangents_b: jax.Array | None = None,
    preconditioner: Params | None = None,
    by_part: bool = False,
    **execution: Unpack[Execution],
) -> Kernel:
    """g_iᵀ Θ(s_i, s'_j) g'_j, [N, M] by component, for given logit cotangents.

    Args:
      cotangents_a: g [N, V], one a site of `sites_a`.
      cotangents_b: g' [M, V], one a site of `sites_b`; given exactly when `sites_b` is.

    For the other arguments and what is raised see `log_prob_kernel`; and JaxdynError if the
    cotangents have another shape.
    """
    rows, columns = _both(model, sites_a, sites_b, cotangents_a, cotangents_b)
    kernels = _kernels("update", model, params, rows, columns, preconditioner, execution)
    return _kernel(kernels, preconditioner, _scalars, by_part)


def token_block(
    model: Model,
    params: Params,
    sites_a: Sites,
    sites_b: Sites | None = None,
    *,
    token_ids: Any,
    preconditioner: Params | None = None,
    **execution: Unpack[Execution],
) -> Kernel:
    """Θ(s_i, s'_j) at the rows and columns of C chosen tokens, [N, M, C, C] by component.

    C backward passes a site. For the arguments and what is raised see `log_prob_kernel`;
    `token_ids` are C ids of the vocabulary.
    """
    vocab = model.config.vocab_size
    rows, columns = _both(model, sites_a, sites_b)
    rows = with_chosen(rows, token_ids, vocab)
    columns = None if columns is None else with_chosen(columns, token_ids, vocab)
    kernels = _kernels("tokens", model, params, rows, columns, preconditioner, execution)
    return _kernel(kernels, preconditioner, lambda x: x.transpose(0, 2, 1, 3))


def sequence_kernel(
    model: Model,
    params: Params,
    rollout_a: Rollout,
    rollout_b: Rollout | None = None,
    *,
    weights_a: jax.Array | None = None,
    weights_b: jax.Array | None = None,
    preconditioner: Params | None = None,
    **execution: Unpack[Execution],
) -> Kernel:
    """⟨∇ Σ_c w_ic log π(y_ic), ∇ Σ_c w'_jc log π(y'_jc)⟩ of completions, [B, B'] by component.

    What an RL update applies: the sum over a completion's tokens, here with one backward pass a
    sequence. It is the sum of `log_prob_kernel` over the pairs of their sites.

    Args:
      rollout_a: B prompts with their completions.
      rollout_b: B' others; without them, `rollout_a` again.
      weights_a: w [B, C], as the advantage over the length; slots outside the completion do not
        count. Without them 1.
      weights_b: w' for `rollout_b`.

    For the other arguments and what is raised see `log_prob_kernel`.
    """
    if rollout_b is None and weights_b is not None:
        raise JaxdynError("weights_b is given without rollout_b; give both or neither")
    rows = sequence_rows(model, rollout_a, weights_a, "rollout_a")
    columns = None
    if rollout_b is not None:
        columns = sequence_rows(model, rollout_b, weights_b, "rollout_b")
    kernels = _kernels("sequence", model, params, rows, columns, preconditioner, execution)
    return _kernel(kernels, preconditioner, _scalars)


def policy_kernel(
    model: Model,
    params: Params,
    sites: Sites,
    rollout: Rollout,
    *,
    weights: Any,
    temperature: float = 1.0,
    places: Any = None,
    rollout_params: Params | None = None,
    preconditioner: Params | None = None,
    **execution: Unpack[Execution],
) -> Kernel:
    """⟨∇h_i, ∇ Σ_c w_jc0 log π(y_jc) + w_jc1 H_jc⟩ of h = log π(y_i) and H_i, [2, N, B].

    What a step along the gradients of completions' functions does to log π of the sites' targets
    and to the entropy H there, to first order: with w the derivatives of a loss by log π and H
    (`jaxdyn.rl.logit_cotangents`) they are the gradients of that loss, completion by completion.

    Args:
      sites: N sites, whose π is that at temperature 1.
      rollout: B prompts with their completions.
      weights: w [B, C, 2]; slots outside the completion do not count.
      temperature: of the completions' π; 0 is read as 1.
      places: completion slots (j, c) [M, 2], to have them by themselves: then [2, N, M].
      rollout_params: where the completions' gradients are taken, if not at `params`: an earlier
        update's, which lives on in momentum.

    For the other arguments and what is raised see `sequence_kernel`.
    """
    rows = site_rows(model, sites, "sites")
    rows = with_both(rows, np.tile(np.eye(2)[:, None], (len(rows.tokens), 1, 1, 1)), 1.0)
    columns = sequence_rows(model, rollout, None, "rollout")
    expected = (*columns.targets.shape, 2)
    if np.shape(weights) != expected:
        raise JaxdynError(f"weights must be [B, C, 2] = {expected}, got {np.shape(weights)}")
    counted = np.where(np.asarray(rollout.completion_mask)[..., None], np.asarray(weights), 0)
    columns = with_both(columns, counted[:, None], temperature)
    if places is not None:
        columns = token_rows(columns, places, "places")
    given = model, params, rows, columns, preconditioner, execution
    kernels = _kernels("policy", *given, rollout_params)
    return _kernel(kernels, preconditioner, lambda x: x[..., 0].transpose(1, 0, 2))


def _both(model, sites_a, sites_b, cotangents_a=None, cotangents_b=None):
    """Rows and columns (None: the rows), checked."""
    if cotangents_a is not None and (sites_b is None) != (cotangents_b is None):
        given, missing = ("sites_b", "cotangents_b")[:: 1 if cotangents_b is None else -1]
        raise JaxdynError(f"{given} is given without {missing}; give both or neither")
    vocab = model.config.vocab_size
    rows = site_rows(model, sites_a, "sites_a")
    columns = None if sites_b is None else site_rows(model, sites_b, "sites_b")
    if cotangents_a is not None:
        rows = with_cotangents(rows, cotangents_a, vocab, "cotangents_a")
    if columns is not None and cotangents_b is not None:
        columns = with_cotangents(columns, cotangents_b, vocab, "cotangents_b")
    return rows, columns


def _kernels(
    kind: str,
    model: Model,
    params: Params,
    rows: Rows,
    columns: Rows | None,
    preconditioner: Params | None,
    execution: Execution,
    column_params: Params | None = None,
) -> dict[str, np.ndarray]:
    """Representation, cross and the gradient component by kind, [(L,) N, K, M, J]."""
    require_options(execution)
    budget, method = budget_of(execution), method_of(execution)
    view, roots = model.view(params), roots_of(model, params, preconditioner)
    other = None if column_params is None else model.view(column_params)
    both = [r for r in (rows, columns) if r is not None]
    leaves = moving_leaves(view, roots)
    moved = sum(x.nbytes for path, x in flatten_dict(view).items() if path in leaves)
    gradients = sum(len(r.tokens) * r.outputs for r in both) * moved
    small = budget if has_adapters(params) else min(TINY, budget)
    if method == "plain" or (method == "auto" and gradients <= small):
        if gradients > budget:
            raise JaxdynError(
                f"method 'plain' holds {gradients} bytes of gradients, and memory_budget is "
                f"{budget}; method 'gram' holds none"
            )
        return fetch(plain_kernels(model, view, roots, rows, columns, other, leaves=leaves))
    require_merged(params)
    where = platform_of(execution, view), model.row_shards
    tiles, streamed = _tiles(model, rows, columns, budget, *where)
    options: Any = {"tied": model.config.tied, "biased": model.config.classifier_bias}
    options["workspace"] = tiles.workspace
    if streamed:
        made: Any = lambda own, tile: Side(own[0], own[1], stream(model, *own, tile))
        multiply: Any = lambda _, left, right: contract_streams(model, left, right, **options)
    else:
        made = lambda own, tile: factorize(model, *own, tile)
        multiply = lambda own, left, right: contract(*own, left, right, **options)
    others = None if other is None else (other, roots)
    called = f"{kind} {model!r}"
    return assemble(called, tiles, (view, roots), made, multiply, execution, others)


def _tiles(model: Model, rows: Rows, columns: Rows | None, *room: Any) -> tuple[Tiling, bool]:
    """The tiles of whole factors or those of streamed rows, and which: whatever takes less work.

    In products of a row's slots with the parameters: a backward pass, like a forward pass, is 2;
    to stream takes a forward pass more, to multiply a streamed row out both; and to form a row's
    gradients is 2.

    Raises:
      JaxdynError: if the budget holds not even one row and one column either way.
    """
    both = [r for r in (rows, columns) if r is not None]
    sizes = [(r.tokens.shape[1], r.positions.shape[1], r.outputs) for r in both]
    found = []
    for bytes_of, to_prepare, to_multiply in ((row_bytes, 4, 2), (stream_bytes, 6, 6)):
        needs = [bytes_of(model, *size) for size in sizes]
        try:
            tiles = tiling(rows, columns, needs, *room)
        except JaxdynError as error:
            refused = error
            continue
        prepared, multiplied = turns(tiles)
        work = to_prepare * prepared + to_multiply * multiplied
        found.append((work, bytes_of is stream_bytes, tiles))
    if not found:
        raise refused
    _, streamed, tiles = min(found, key=lambda way: way[:2])
    return tiles, streamed


def gradient_of(kernels: dict) -> Any:
    """The gradient component of an engine's results: the sum over kinds and layers."""
    return sum(x.sum(axis=0) for name, x in kernels.items() if name not in PATHS)


def _kernel(kernels: dict, preconditioner: Params | None, entries, by_part: bool = False) -> Kernel:
    part = lambda x: jnp.asarray(entries(x))
    kinds = {kind: x for kind, x in kernels.items() if kind not in PATHS and by_part}
    return Kernel(
        part(kernels["representation"]),
        part(gradient_of(kernels)),
        part(kernels["cross"]),
        preconditioned=preconditioner is not None,
        parts={kind: jnp.asarray(x[:, :, 0, :, 0]) for kind, x in kinds.items()} or None,
    )


def _scalars(x: np.ndarray) -> np.ndarray:
    """[N, 1, M, 1] -> [N, M]."""
    return x[:, 0, :, 0]
