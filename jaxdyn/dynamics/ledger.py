r"""The ledger: what a training did between two or more checkpoints, exactly, part by part.

Along any path θ(t) from the parameters before to those after, and for any function h of the policy
at a site,

    h(θ(1)) − h(θ(0)) = Σ_parts ∫₀¹ ⟨∂h/∂θ_part (θ(t)), θ̇_part(t)⟩ dt,

for any partition of the parameters. Here the path is piecewise linear through the checkpoints, so
that θ̇ is the segment's change Δ, and h are log π of the site's token, entropy, confidence, margin
and the KL to the first checkpoint (`jaxdyn.dynamics.observables`). The parts are the components

    representation ∫ ⟨∂h/∂f, ΔW φ⟩ dt        gradient ∫ ⟨∂h/∂f, W Dφ Δψ⟩ dt,

of a tied matrix its two roles, ΔE as unembedding and ΔE as embedding, which needs no cross term;
and on request layers and kinds of parameter (`jaxdyn.dynamics.ledger_layers`). Integrals are
by Clenshaw and Curtis's rule, whose nodes are doubled until what is missing is below a tolerance:
the parts' sum is compared with the change itself, which is known.

Single updates do not add up to this by their shares: steps that go together and steps that cancel
look alike one by one. The path integral is due to Sundararajan et al. 2017 (integrated gradients)
for inputs; its nearest relative for parameters is ExPLAIND (arXiv 2505.20076), which replays a
training; two checkpoints, the policy's own functions and the NTK's components are ours.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import jax
import numpy as np
from flax import struct
from jaxtyping import Int

from jaxdyn.dynamics.ledger_path import (
    BY_ROLE,
    Batch,
    PathThrough,
    Request,
    Segment,
    batches_of_texts,
    largest,
    less,
    look,
    moved,
)
from jaxdyn.dynamics.observables import QUANTITIES
from jaxdyn.kernels.execution import Execution, budget_of, require_options
from jaxdyn.kernels.memory import nbytes
from jaxdyn.types import JaxdynError, Model, Params, Sites


@struct.dataclass
class Ledger:
    """K segments' accounts at N sites in B texts; host arrays.

    values: {quantity: [K + 1, N]}, at every checkpoint.
    parts: {quantity: {component: [K, N]}}, of its change.
    token_values, token_parts: log π of A further tokens a site, [K + 1, N, A] and [K, N, A].
    by_layer: {quantity: {kind: [K, B, L]}}, summed over a text's sites; see `text_parts`.
    by_token: {quantity: [K, L + 2, N]}, by place in the body; see `site_layer_parts`.
    nodes: [K, B], how many nodes each text took; 0 where it has no site.
    """

    values: dict[str, np.ndarray]
    parts: dict[str, dict[str, np.ndarray]]
    token_values: np.ndarray
    token_parts: dict[str, np.ndarray]
    by_layer: dict[str, dict[str, np.ndarray]]
    by_token: dict[str, np.ndarray]
    nodes: np.ndarray

    def change(self, quantity: str) -> np.ndarray:
        """What really changed over each segment, [K, N]."""
        return np.diff(self.values[quantity].astype(np.float64), axis=0)

    def residual(self, quantity: str) -> np.ndarray:
        """The components' sum less the change, [K, N]: what the quadrature missed."""
        return sum(self.parts[quantity].values()) - self.change(quantity)


def ledger(
    model: Model,
    checkpoints: Iterable[Params],
    sites: Sites,
    *,
    token_ids: Int[np.ndarray, "N A"] | None = None,
    through: PathThrough = "parameters",
    by_layer: tuple[str, ...] = (),
    by_token: tuple[str, ...] = (),
    tolerance: float = 1e-4,
    **execution: Unpack[Execution],
) -> Ledger:
    """The account of every change from one checkpoint to the next, at the sites.

    Beside the model's pass it takes three copies of the parameters, if `checkpoints` gives them
    one by one and keeps none. Without layers, completions of one prompt share the prompt's pass.

    Args:
      model: a `LanguageModel`; its dtype is that of the passes. Differences of a bfloat16 pass are
        mostly rounding: take float32.
      checkpoints: K + 1 parameter trees, as stored, of one shape; adapters stay in place, and their
        factors are parts.
      sites: N sites; `sites_from_rollout` has every token of whole completions if asked for as many
        as there are.
      token_ids: A further tokens a site whose log π is followed too; with all V of them, the whole
        distribution.
      through: the straight line in "parameters"; or in "features", W(t) and φ(t) both straight,
        which takes one pass of the body a checkpoint and closes as exactly, but is another path and
        says nothing of layers. Of the logits it is the closed form ΔW (φ + φ')/2 + (W + W')/2 Δφ.
      by_layer: quantities to be split by layer and kind, summed over a text's sites.
      by_token: quantities to be split by layer at every site: a pass a layer.
      tolerance: of the rms residual over a batch of texts, relative to the rms change over all
        sites, for log π, entropy and KL.
      execution: `memory_budget`, `progress` and `blocks`: see `Execution`.

    Raises:
      JaxdynError: if there are fewer than two checkpoints, all are equal, two are of different
        shapes, a quantity is unknown, the path through features is asked for layers, or as
        `log_prob_kernel`.
    """
    require_options(execution, "memory_budget", "progress", "blocks")
    _check(by_layer, by_token, through)
    following = iter(checkpoints)
    start = next(following, None)
    if start is None:
        raise JaxdynError("a ledger is of two checkpoints or more, got none")
    shapes = jax.tree.map(np.shape, start)
    budget = budget_of(execution)
    at_once = max(1, budget // 8 // nbytes(start))
    request = Request(through, tuple(by_layer), tuple(by_token), at_once)
    ids = np.zeros((len(sites.rows), 0), np.int32) if token_ids is None else np.asarray(token_ids)
    batches = batches_of_texts(model, sites, ids, budget, share=not (by_layer or by_token))
    head = model.view(start)["classifier"]
    seen = [[look(model, start, head, batch) for batch in batches]]
    batches = [b._replace(start=phi) for b, (phi, _) in zip(batches, seen[0], strict=True)]
    accounts: list[list[dict[str, np.ndarray]]] = []
    happened = False
    for end in following:  # `enumerate` would keep it
        number = len(accounts)
        if jax.tree.map(np.shape, end) != shapes:
            raise JaxdynError(f"checkpoint {number + 1} has other parameters than the first")
        seen.append([look(model, end, head, batch) for batch in batches])
        change = less(end, start)
        del end
        happened = happened or bool(largest(change) > 0)
        segment = Segment(model, start, change, head, request, tolerance, *seen[-2:])
        accounts.append(segment.account(batches, number, execution))
        start = moved(start, change, 1.0)  # exactly `end`, unless a weight has more than doubled
    if not accounts:
        raise JaxdynError("a ledger is of two checkpoints or more, got one")
    if not happened:
        raise JaxdynError(f"the {len(seen)} checkpoints are equal: nothing happened")
    return _assemble(batches, seen, accounts, request, sites)


def _check(by_layer: tuple[str, ...], by_token: tuple[str, ...], through: PathThrough) -> None:
    for name in (*by_layer, *by_token):
        if name not in QUANTITIES:
            raise JaxdynError(f"a ledger's quantities are {', '.join(QUANTITIES)}, got {name!r}")
    if through not in ("parameters", "features"):
        raise JaxdynError(f"through must be 'parameters' or 'features', got {through!r}")
    if through == "features" and (by_layer or by_token):
        raise JaxdynError("the path through features has no layers: take through='parameters'")


def _assemble(
    batches: list[Batch],
    seen: list[list[Any]],
    accounts: list[list[dict[str, np.ndarray]]],
    request: Request,
    sites: Sites,
) -> Ledger:
    """Everything by site and by text, in the order in which they were given."""
    count, texts = len(sites.rows), len(sites.tokens)

    def by_site(of_batches, axis):
        """Arrays of every batch's places, along `axis`, as one of the N sites."""
        shape = list(np.shape(of_batches[0]))
        shape[axis] = count
        whole = np.zeros(shape, np.asarray(of_batches[0]).dtype)
        for batch, x in zip(batches, of_batches, strict=True):
            real = np.asarray(batch.real, bool)
            place = (*[slice(None)] * axis, batch.numbers[real])
            whole[place] = np.compress(real, x, axis=axis)
        return whole

    def by_text(of_batches):
        """[Q, B', L] of every batch's texts as [Q, B, L]."""
        shape = list(np.shape(of_batches[0]))
        shape[1] = texts
        whole = np.zeros(shape)
        for batch, x in zip(batches, of_batches, strict=True):
            real = batch.texts >= 0
            whole[:, batch.texts[real]] = np.asarray(x)[:, real]
        return whole

    observed = [[np.asarray(o.quantities) for _, o in of_one] for of_one in seen]
    values = np.stack([by_site(x, 1) for x in observed])
    parts = {
        name: np.stack([by_site([x[name] for x in of_one], 1) for of_one in accounts])
        for name in BY_ROLE
    }
    tokens = lambda of_batches: by_site(of_batches, 0)
    kinds = [n.removeprefix("layer/") for n in accounts[0][0] if n.startswith("layer/")]
    layers = {
        kind: np.stack([by_text([x[f"layer/{kind}"] for x in of_one]) for of_one in accounts])
        for kind in kinds
    }
    places = np.zeros(0)
    if request.by_token:
        places = np.stack([by_site([x["places"] for x in of_one], 2) for of_one in accounts])
    nodes, rows = np.zeros((len(accounts), texts), np.int32), np.asarray(sites.rows)
    for of_segment, of_one in zip(nodes, accounts, strict=True):
        for batch, x in zip(batches, of_one, strict=True):
            of_segment[rows[batch.numbers]] = x["nodes"]
    return Ledger(
        values={name: values[:, q] for q, name in enumerate(QUANTITIES)},
        parts={
            name: {part: x[:, q] for part, x in parts.items()} for q, name in enumerate(QUANTITIES)
        },
        token_values=np.stack([tokens([np.asarray(o.tokens) for _, o in x]) for x in seen]),
        token_parts={
            name: np.stack([tokens([x[f"tokens/{name}"] for x in of_one]) for of_one in accounts])
            for name in BY_ROLE
        },
        by_layer={
            name: {kind: x[:, q] for kind, x in layers.items()}
            for q, name in enumerate(request.by_layer)
        },
        by_token={name: places[:, q] for q, name in enumerate(request.by_token)},
        nodes=nodes,
    )
