"""Many backward passes from the same features: sites opened once, and groups of passes in tiles.

What both routes to the trace share: a pass pulls one vector r of the feature space back, and adds
⟨Jᵀr, J'ᵀr⟩ of every pair of sites.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.kernels.blocks import assemble, tiling
from jaxdyn.kernels.contractions import gradient_of
from jaxdyn.kernels.execution import Execution, budget_of, platform_of
from jaxdyn.kernels.gram import Factors, body_kernels, factors_of, pulled, stacked
from jaxdyn.kernels.memory import opened_bytes
from jaxdyn.kernels.rows import Rows
from jaxdyn.types import Model, Params, View

GROUP = 64
"""Passes after which a tile is finished as far as they go: they are progress, and are kept."""


class Traced(NamedTuple):
    """What a trace is of: a model's view and its metric's √P, rows and columns (None: the rows)."""

    model: Model
    view: View
    roots: Params | None
    rows: Rows
    columns: Rows | None


class Opened:
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
        cotangents = pulled(self.pull, jax.vmap(start)(block))
        found = factors_of(self.backbone, self.inputs, cotangents, self.roots)
        # [L, N, K, (T,) O] -> [L, N, 1, (T,) K O]
        side = lambda x: jnp.moveaxis(x, 2, -2).reshape(*x.shape[:2], 1, *x.shape[3:-1], -1)
        return found._replace(
            cotangents=jax.tree.map(side, found.cotangents),
            vectors=jax.tree.map(side, found.vectors),
        )

    def weighted(self, x: jax.Array, ids: jax.Array, power: int) -> jax.Array:
        """x [..., D] times P^(power/2) of the embedding's rows `ids` [...]."""
        if self.roots is None:
            return x
        return x * self.roots["embed"]["embedding"][ids] ** power


class Pair:
    """Opened rows and columns (None: the rows), and the traces' parts between them, [N, M]."""

    def __init__(self, model, view, roots, rows, columns, workspace: int):
        self.view, self.roots, self.workspace = view, roots, workspace
        self.biased = model.config.classifier_bias
        self.left = Opened(model, view, roots, rows)
        self.alike = columns is None
        self.right = self.left if self.alike else Opened(model, view, roots, columns)
        self.wide = wide_weight(view["classifier"]["weight"]).dtype

    def representation(self) -> jax.Array:
        """V ⟨φ, φ'⟩, or in a metric Σ_j (Σ_k P_kj) φ_j φ'_j."""
        unit = lambda x: jnp.ones(x.shape, self.wide)
        head = self.view["classifier"]
        head = jax.tree.map(unit, head) if self.roots is None else self.roots["classifier"]
        weights = jnp.sum(head["weight"].astype(self.wide) ** 2, axis=0)
        found = self._inner(self.left.phi * weights[None], self.right.phi)
        if self.biased:
            found += jnp.sum(head["bias"].astype(self.wide) ** 2)
        return found

    def gradient(self, block: jax.Array) -> tuple[jax.Array, Factors, Factors]:
        """Σ_k ⟨Jᵀr_k, J'ᵀr_k⟩ of a block of r [K, D], and the factors of both sides."""
        mine = self.left.factors(block)
        other = None if self.alike else self.right.factors(block)
        roots = None if self.roots is None else self.roots["backbone"]
        parts = body_kernels(mine, other, roots, self.view["backbone"], self.workspace)
        return gradient_of(parts)[:, 0, :, 0], mine, mine if other is None else other

    def cross(self, u: jax.Array, v: jax.Array) -> jax.Array:
        """φ·v' + u·φ', of what the embedding gives the rows and the columns."""
        return self._inner(self.left.phi, v) + self._inner(u, self.right.phi)

    def _inner(self, x, y):
        return jnp.einsum("nd,md->nm", x, y, precision="highest", preferred_element_type=self.wide)


def wide_weight(weight: jax.Array) -> jax.Array:
    """W in float32 or better."""
    return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))


def over_passes(
    given: Traced,
    passes: Any,
    tile_of: Callable[..., Callable],
    merge: Callable[[dict, int, dict, int], dict],
    execution: Execution,
) -> dict[str, np.ndarray]:
    """The results of all passes, [N, M] by name, a group of passes and a tile at a time.

    Args:
      passes: arrays whose leading axis counts the passes.
      tile_of: from how many passes a group has, how many fit at a time, whether it is the first,
        and the workspace, to a function of ((view, roots, group), rows, columns) with arrays
        [N, 1, M, 1] by name.
      merge: the results of the first n passes with those of m more: `merge(found, n, more, m)`.
    """
    model, view, roots, rows, columns = given
    longest = max((r for r in (rows, columns) if r is not None), key=lambda r: r.tokens.shape[1])
    held, each = opened_bytes(model, longest.tokens.shape[1])
    needs = [(held + each, 0)] * (1 if columns is None else 2)
    where = platform_of(execution, view), model.row_shards
    tiles = tiling(rows, columns, needs, budget_of(execution), *where)
    room = max(1, (tiles.each - held) // each)
    kernels: dict[str, np.ndarray] = {}
    count = len(jax.tree.leaves(passes)[0])
    groups = range(0, count, GROUP)
    for number, start in enumerate(groups):
        group = jax.tree.map(lambda x, start=start: x[start : start + GROUP], passes)
        many = min(GROUP, count - start)
        found = assemble(
            f"trace {start} {count} {model!r}",
            tiles,
            (view, roots, group),
            lambda operands, part: part,
            tile_of(many, room, start == 0, tiles.workspace),
            _of_group(execution, number, len(groups)),
        )
        found = {name: x[:, 0, :, 0] for name, x in found.items()}
        kernels = merge(kernels, start, found, many) if kernels else found
    return kernels


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
