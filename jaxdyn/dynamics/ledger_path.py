r"""One segment of a ledger: a straight path, the derivatives along it, and their integrals.

A path's rate of change at one of its points is a node; their number is doubled until the integrals
of the parts add up to the change, some texts at a time.
"""

import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdyn.dynamics.ledger_layers import site_layer_parts, text_parts
from jaxdyn.dynamics.observables import (
    QUANTITIES,
    SMOOTH,
    At,
    Observed,
    observe,
    observed_parts,
)
from jaxdyn.dynamics.precision import exact_products
from jaxdyn.hosts import fetch
from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.memory import opened_bytes
from jaxdyn.kernels.operator import batches_of, site_features, sites_of
from jaxdyn.kernels.store import Store, digest
from jaxdyn.types import COMPONENTS, Model, Params, Sites

BY_ROLE = COMPONENTS[:2]
"""A path's components: of a tied matrix its roles are apart, and nothing crosses."""

PathThrough = Literal["parameters", "features"]

FIRST_INTERVALS, MOST_INTERVALS = 2, 64

SHORT_NODES = 3
"""Nodes of a segment of a few updates, where W φ is quadratic and log π nearly so."""

SMOOTH_ROWS = [QUANTITIES.index(name) for name in SMOOTH]


class Request(NamedTuple):
    """What is asked of every node: the path, the quantities by layer and those by token, and how
    many layers' products are taken at a time."""

    through: PathThrough
    by_layer: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()
    layers_at_once: int = 1


class Batch(NamedTuple):
    """S sites of some of the texts, with φ⁰ [S, D] once it is known; `sites` by field.

    token_ids [S, A]; `real` [S] is 1 where a site is there for the first time, else 0; `numbers`
    [S] says which of all sites they are, `texts` [B'] which of all texts the rows are (-1: again;
    of rows that branch, one of each).
    """

    sites: dict[str, Any]
    token_ids: Any
    real: Any
    numbers: Any
    texts: Any
    start: Any = None


class Seen(NamedTuple):
    """φ [S, D] of a checkpoint at a batch's sites, and h."""

    phi: Any
    observed: Observed


def batches_of_texts(
    model: Model, sites: Sites, token_ids: np.ndarray, budget: int, share: bool
) -> list[Batch]:
    """The sites by batches of their texts, of one shape, under a budget of bytes a batch.

    To `share`, texts of one prompt become one row that branches, where that saves enough; what is
    summed over a text by layers cannot, as it is in the prompt's slots too.

    Raises:
      JaxdynError: if the budget is too small for one text, and as `site_rows`.
    """
    wide = jnp.promote_types(model.dtype, jnp.float32).itemsize

    def text_bytes(model, slots, most):
        """Of the opened pass with tangents beside, and of a dozen arrays of the logits' size."""
        return sum(opened_bytes(model, slots)) * 3 // 2 + 12 * most * model.config.vocab_size * wide

    execution = Execution(memory_budget=budget)
    found = batches_of(model, sites, "sites", execution, text_bytes, share=share)
    rows = np.asarray(sites.rows)
    batches = []
    for i, (numbers, real) in enumerate(zip(found.numbers, found.real, strict=True)):
        own = {name: x[i] for name, x in found.sites.items()}
        texts = np.full(len(own["tokens"]), -1)
        texts[own["rows"]] = rows[numbers]
        batches.append(Batch(own, token_ids[numbers], real.astype(np.float32), numbers, texts))
    return batches


# -- what runs on the device ---------------------------------------------------------------------


def _at(model: Model, head: Params, sites: dict[str, Any], token_ids, phi) -> At:
    return At(sites["targets"], token_ids, model.logits(head, phi))


def look(model: Model, params: Params, head: Params, batch: Batch) -> Seen:
    """φ and h at the batch's sites; `head` is the first checkpoint's classifier."""
    return _look(model, params, head, batch.sites, batch.token_ids, batch.start)


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def _look(model, params, head, sites, token_ids, start):
    view = model.view(params)
    phi = site_features(model, view["backbone"], sites_of(sites))
    at = _at(model, head, sites, token_ids, phi if start is None else start)
    return Seen(phi, observe(at, model.logits(view["classifier"], phi)))


@functools.partial(jax.jit, static_argnums=(0, 1))
@exact_products
def node(model, request: Request, params, change, head, sites, token_ids, start):
    """ḣ at a point of the straight line in parameters, along its change; arrays by name."""
    view, change = model.view(params), model.view(change)
    at, sites = _at(model, head, sites, token_ids, start), sites_of(sites)
    body = lambda psi: site_features(model.unfused, psi, sites)
    phi, d_phi = jax.jvp(body, (view["backbone"],), (change["backbone"],))
    parts = observed_parts(model, at, view["classifier"], change["classifier"], phi, d_phi)
    found = _named(parts)
    if request.by_token:
        found["places"] = site_layer_parts(
            model, view, change, sites, at, request.by_token, request.layers_at_once
        )
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
@exact_products
def text_node(model, request: Request, start, change, t, head, sites, token_ids, first, real):
    """The same of texts by layer and kind, at t of the line, where no tree of it is formed."""
    view, change = model.view(start), model.view(change)
    at, sites = _at(model, head, sites, token_ids, first), sites_of(sites)
    kinds = text_parts(model, view, change, t, sites, at, real, request.by_layer)
    return {f"layer/{kind}": x for kind, x in kinds.items()}


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def feature_node(model, start, change, t, head, sites, token_ids, first, phi, end):
    """The same at a point of the straight line in W and φ, without layers."""
    along = lambda x, d: x + t.astype(x.dtype) * d
    weights = jax.tree.map(along, start, change)
    at, d_phi = _at(model, head, sites, token_ids, first), end - phi
    return _named(observed_parts(model, at, weights, change, along(phi, d_phi), d_phi))


def _named(parts: dict[str, Observed]) -> dict[str, jax.Array]:
    tokens = {f"tokens/{name}": x.tokens for name, x in parts.items()}
    return {name: x.quantities for name, x in parts.items()} | tokens


@functools.partial(jax.jit, static_argnums=0)
@exact_products
@jax.named_scope("ledger")
def feature_account(
    model: Model,
    before: tuple[Params, jax.Array],
    after: tuple[Params, jax.Array],
    at: At,
) -> tuple[dict[str, Observed], Observed]:
    """∫ ḣ dt by component, and the change of h, where W and φ move straight from (W, φ) before to
    (W', φ') after: a few products with the classifier, and no pass of the body.

    Along short segments of a training this path and the straight line in parameters agree.
    """
    (head, phi), (new_head, new_phi) = before, after
    d_head, d_phi = less(new_head, head), new_phi - phi
    places, weights = np.polynomial.legendre.leggauss(SHORT_NODES)
    parts = [
        jax.tree.map(
            lambda x, weight=weight: weight * x,
            observed_parts(model, at, moved(head, d_head, t), d_head, phi + t * d_phi, d_phi),
        )
        for t, weight in zip((places + 1) / 2, weights / 2, strict=True)
    ]
    seen = [observe(at, model.logits(w, x)) for w, x in (before, after)]
    change = jax.tree.map(jnp.subtract, seen[1], seen[0])
    return jax.tree.map(lambda *x: sum(x), *parts), change


@jax.jit
def less(end: Params, start: Params) -> Params:
    """end − start."""
    return jax.tree.map(jnp.subtract, end, start)


@jax.jit
def moved(start: Params, change: Params, t: ArrayLike) -> Params:
    """start + t change."""
    return jax.tree.map(lambda x, d: x + jnp.asarray(t, x.dtype) * d, start, change)


@jax.jit
def largest(tree: Params) -> jax.Array:
    """The largest absolute value."""
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)])


# -- a segment -----------------------------------------------------------------------------------


class Segment(NamedTuple):
    """The straight line from `start` along `change`, what is asked of it, and what every batch sees
    at its two ends; `head` is the first checkpoint's classifier."""

    model: Model
    start: Params
    change: Params
    head: Params
    request: Request
    tolerance: float
    before: list[Seen]
    after: list[Seen]

    def account(
        self, batches: list[Batch], number: int, execution: Execution
    ) -> list[dict[str, np.ndarray]]:
        """Every batch's integrals by name, and "nodes", how many they took; finished ones are kept
        in `blocks` and taken up from there."""
        ends = zip(self.before, self.after, strict=True)
        changes = [np.asarray(a.observed.quantities - b.observed.quantities) for b, a in ends]
        allowed = self.tolerance * _rms(changes, batches)
        store = self._store(batches, number, execution)
        found: list[dict[str, np.ndarray]] = []
        for i, (batch, change) in enumerate(zip(batches, changes, strict=True)):
            kept = store.load(i, 0) if store else None
            if kept is None:
                kept = self._closed(batch, i, change, allowed)
                if store:
                    store.save(i, 0, kept)
                if "progress" in execution:
                    done = number * len(batches) + i + 1
                    execution["progress"](done, (number + 1) * len(batches))
            found.append(kept)
        return found

    def _closed(
        self, batch: Batch, i: int, change: np.ndarray, allowed: np.ndarray
    ) -> dict[str, np.ndarray]:
        """∫ ḣ dt over the batch, with as many nodes as it takes to close; each is used again."""
        rates: dict[float, dict[str, np.ndarray]] = {}
        missing: Any = np.inf
        intervals = FIRST_INTERVALS
        while True:
            total: dict[str, np.ndarray] = {}
            for t, weight in zip(*clenshaw_curtis(intervals), strict=True):
                if t not in rates:
                    rates[t] = self._rates(batch, i, t)
                for name, rate in rates[t].items():
                    part = weight * np.asarray(rate, np.float64)
                    total[name] = total[name] + part if name in total else part
            parts = sum(total[name] for name in BY_ROLE)
            residual = _rms([parts - change], [batch])
            # Nodes converge geometrically: what a doubling does not halve is rounding.
            ended = (residual <= allowed) | (residual > 0.5 * missing)
            if np.all(ended) or intervals >= MOST_INTERVALS:
                return {**total, "nodes": np.asarray(len(rates))}
            missing, intervals = residual, 2 * intervals

    def _rates(self, b: Batch, i: int, t: float) -> dict[str, np.ndarray]:
        """ḣ at t."""
        if self.request.through == "parameters":
            program, given = (self.model, self.request), (self.head, b.sites, b.token_ids, b.start)
            found = fetch(node(*program, moved(self.start, self.change, t), self.change, *given))
            if self.request.by_layer:
                trees = self.start, self.change
                found |= fetch(text_node(*program, *trees, t, *given, b.real))
            return found
        start, change = (self.model.view(x)["classifier"] for x in (self.start, self.change))
        line = (start, change, jnp.asarray(t))
        ends = (self.head, b.sites, b.token_ids, b.start, self.before[i].phi, self.after[i].phi)
        return fetch(feature_node(self.model, *line, *ends))

    def _store(self, batches: list[Batch], number: int, execution: Execution) -> Store | None:
        if "blocks" not in execution:
            return None
        given = [repr(self.model), repr(self.request), self.tolerance]
        trees = [self.start, self.change, self.head, batches]
        directory = Path(execution["blocks"]) / f"segment_{number:03d}"
        return Store(directory, ["ledger", *given, *[digest(tree) for tree in trees]])


def clenshaw_curtis(intervals: int) -> tuple[list[float], np.ndarray]:
    """Nodes and weights on [0, 1] of an even number n of intervals: t_k = (1 + cos(k π / n)) / 2.

    Of twice as many intervals every second node is one of these, so that doubling wastes none; the
    rule is about as good as Gauss's with as many nodes (Trefethen 2008, SIAM Review 50, 67).
    """
    k = np.arange(intervals + 1)
    even = np.arange(0, intervals + 1, 2)  # ∫ cos(j x) sin(x) dx over [0, π] is 2 / (1 − j²)
    moments = np.where((even == 0) | (even == intervals), 0.5, 1) * 2 / (1 - even**2)
    ends = np.where((k == 0) | (k == intervals), 0.5, 1)
    weights = ends / intervals * (np.cos(np.outer(k, even) * np.pi / intervals) @ moments)
    # The same float for a node at every level, so that it is found again.
    places = [(1 + math.cos(math.pi * (i / intervals))) / 2 for i in k.tolist()]
    return places, weights


def _rms(of_batches: list[np.ndarray], batches: list[Batch]) -> np.ndarray:
    """The root mean square over all real sites, of every smooth quantity."""
    each = zip(of_batches, batches, strict=True)
    real = [np.compress(b.real > 0, x[SMOOTH_ROWS], axis=1) for x, b in each]
    return np.sqrt(np.mean(np.concatenate(real, axis=1) ** 2, axis=1))
