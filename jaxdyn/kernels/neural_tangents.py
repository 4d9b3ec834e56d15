"""Our models in the convention of neural-tangents, and our kernels under its signature.

    nt, x = load(), site_prefixes(sites)
    nt.empirical_ntk_fn(ApplyFn(model))(x, None, params)    # neural-tangents'
    empirical_ntk_fn(ApplyFn(model))(x, None, params)       # jaxdyn's, the same numbers

Both are tr Θ(s_i, s_j) / V, [N, N]: neural-tangents divides a traced axis by its size. `load`
imports it on today's jax (`jaxdyn.kernels.neural_tangents_import`).
"""

import dataclasses
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.kernels.contractions import token_block
from jaxdyn.kernels.execution import Execution
from jaxdyn.kernels.neural_tangents_import import load as load
from jaxdyn.kernels.trace import trace_kernel
from jaxdyn.types import JaxdynError, Model, Params, Sites


@jax.jit
def site_prefixes(sites: Sites) -> Int[Array, "N T"]:
    """Each site as the tokens before it: the batch `x` of `ApplyFn`.

    Row n is the site's sequence up to and including its slot, with -1 wherever there is no token
    (padding, and every later slot), so the last token of a row is where the feature is read. One
    self-contained row a site is what `vmap_axes=0` and `nt.batch` need.
    """
    slots = jnp.arange(sites.tokens.shape[1])
    seen = jnp.asarray(sites.mask)[sites.rows] & (slots[None, :] <= sites.positions[:, None])
    return jnp.where(seen, sites.tokens[sites.rows], -1)


@dataclasses.dataclass(frozen=True)
class ApplyFn:
    """The model as `f(params, x)`: logits [N, V] at the last token of each prefix of x [N, T].

    `params` are the stored parameters, so the derivative of a tied model follows its one matrix
    along both paths. Rows of `x` are independent: neural-tangents' default `vmap_axes=0` holds.
    `x` is `site_prefixes(sites)`, or any int array of token ids with -1 for no token.
    """

    model: Model

    def __call__(self, params: Params, x: Int[Array, "N T"]) -> Float[Array, "N V"]:
        view, mask = self.model.view(params), x >= 0
        features = self.model.unfused.features(view["backbone"], jnp.where(mask, x, 0), mask)
        at_sites = features[jnp.arange(x.shape[0]), _last(mask)]
        return self.model.logits(view["classifier"], at_sites)


def empirical_ntk_fn(
    f: Callable,
    trace_axes: int | tuple[int, ...] = (-1,),
    diagonal_axes: int | tuple[int, ...] = (),
    vmap_axes: int | None = None,
    **execution: Unpack[Execution],
) -> Callable[..., jax.Array]:
    """jaxdyn's kernels under the signature of `nt.empirical_ntk_fn`.

    Of the outputs [N, V] the vocabulary is traced, giving tr Θ(x1_i, x2_j) / V [N, M] as
    `trace_kernel(..., mean=True)`, or with `trace_axes=()` kept, giving Θ [N, M, V, V] as
    `token_block` of every token. The result is the components' sum, and it runs on the host, in
    its own tiles: neither `jax.jit` nor `nt.batch` goes around it.

    Args:
      f: the function to differentiate; only an `ApplyFn`, whose model our kernels need.
      vmap_axes: 0 or None, which mean the same here: rows are independent.
      execution: `method`, in the place of `implementation`, and more: see `Execution`.

    Returns:
      `kernel_fn(x1, x2, params)`, with `x2=None` for `x1` again.

    Raises:
      JaxdynError: `f` is another function, or the axes are others than those above.
    """
    if not isinstance(f, ApplyFn):
        raise JaxdynError(f"f must be an ApplyFn, got {f!r}; other functions: load()")
    axes = lambda x: (x,) if isinstance(x, int) else tuple(x)
    traced = tuple(axis % 2 for axis in axes(trace_axes))
    if traced not in ((), (1,)) or axes(diagonal_axes) or vmap_axes not in (0, None):
        raise JaxdynError(
            "trace_axes must be (-1,) or (), diagonal_axes () and vmap_axes 0 or None, got "
            f"{trace_axes}, {diagonal_axes} and {vmap_axes}; for other axes use load()"
        )

    def kernel_fn(x1: jax.Array, x2: jax.Array | None, params: Params) -> jax.Array:
        sites = _prefix_sites(x1), None if x2 is None else _prefix_sites(x2)
        if traced:
            return trace_kernel(f.model, params, *sites, mean=True, **execution).total
        every = np.arange(f.model.config.vocab_size)
        return token_block(f.model, params, *sites, token_ids=every, **execution).total

    return kernel_fn


def _last(mask: Bool[Array, "N T"]) -> Int[Array, " N"]:
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def _prefix_sites(x: Int[Array, "N T"]) -> Sites:
    """The sites of `site_prefixes`, one a sequence; what follows them is unknown and set to 0."""
    mask, count = x >= 0, len(x)
    return Sites(
        tokens=jnp.where(mask, x, 0),
        mask=mask,
        rows=jnp.arange(count),
        positions=_last(mask),
        targets=jnp.zeros(count, jnp.int32),
        is_prompt=jnp.zeros(count, bool),
    )
