"""Flax's layers, open: a backward pass tells what each read and the cotangent of what it wrote.

A layer sows its input as "intermediates" and adds a "perturbation" of zero to its output
(`LanguageModel.opened`). A whole block does so with what it reads, as "stream", and with "shifts"
of zero (`LanguageModel.streamed`). Or a layer's parameters lie on a line, at "places" along
"changes" of them, and a backward pass hands back what each of these does as "items"
(`LanguageModel.itemized`). Without these collections nothing is recorded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdyn.models.itemized import itemized

RECORDS = ("intermediates", "perturbations", "changes", "places", "items", "stream", "shifts")
"""The collections beside the parameters."""


class OnLine:
    """A layer that may lie on a line: its parameters are then θ + t Δ, which is formed in it."""

    def param(self, name: str, *arguments: Any, **options: Any) -> Any:
        layer: Any = self
        return _placed(layer, name, super().param(name, *arguments, **options))  # type: ignore


def _placed(layer: nn.Module, name: str, x: Any) -> Any:
    if "changes" not in layer.variables:
        return x
    t, change = (layer.variables[of][name] for of in ("places", "changes"))
    return x + t * change


def _own(layer: nn.Module) -> dict[str, Any]:
    """The layer's parameters, where they are."""
    return {name: _placed(layer, name, x) for name, x in layer.variables["params"].items()}


def _sow_input(layer: nn.Module, x: Any, collection: str = "intermediates") -> None:
    layer.sow(collection, "input", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


@jax.custom_jvp
def shifted(x, shift):
    """x + shift of a shift that is zero: it has a cotangent, and is never read."""
    del shift
    return x


@shifted.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] + tangents[1]


def _open_output(layer: nn.Module, read: Any, x: Any, lora_scale: float = 1.0) -> Any:
    if "changes" in layer.variables:
        change, items = (dict(layer.variables[of]) for of in ("changes", "items"))
        return itemized(lora_scale, x, read, _own(layer), change, items)
    if layer.is_mutable_collection("perturbations"):
        return layer.perturb("output", x)
    shift: Any = layer.get_variable("perturbations", "output")
    return x if shift is None else shifted(x, shift)


def enter(block: nn.Module, x: Any) -> Any:
    """What a block reads, open."""
    _sow_input(block, x, "stream")
    return x


def leave(block: nn.Module, x: Any) -> Any:
    """What a block writes, open."""
    shift: Any = block.get_variable("shifts", "output")
    return x if shift is None else shifted(x, shift)


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Dense(OnLine, nn.Dense):
    """y = x K, + b if `biased`, with an adapter + s (x A) B, open at x and y."""

    biased: bool = False
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, inputs):
        _sow_input(self, inputs)
        output = super().__call__(inputs)
        if self.biased:
            bias: Any = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            # Cast where it is already at every slot: its gradient, their sum, is then in float32.
            output += jnp.broadcast_to(_wide(bias), output.shape).astype(output.dtype)
        if self.has_variable("params", "lora_a"):
            own = _own(self)
            x, a, b = nn.dtypes.promote_dtype(
                inputs, own["lora_a"], own["lora_b"], dtype=self.dtype
            )
            # As `matrix_product`: a gradient over two axes of bfloat16 may be summed in bfloat16.
            rows = x.reshape(-1, x.shape[-1])
            output += self.lora_scale * ((rows @ a) @ b).reshape(output.shape)
        return _open_output(self, inputs, output, self.lora_scale)


class Embed(OnLine, nn.Embed):
    """Rows of a table by id, open at the ids and the rows.

    Rows are cast and not the table, whose gradient is then a sum over slots in float32 or better.
    """

    def __call__(self, inputs):
        _sow_input(self, inputs)
        return _open_output(self, inputs, self.look_up(inputs))

    def look_up(self, ids):
        return jnp.take(_wide(self.embedding), ids, axis=0).astype(self.dtype)


def _unit(norm: nn.Module, x: Any, options: dict[str, Any], **without: bool) -> Any:
    """x̂, sown; None if nobody asks."""
    if not (norm.is_mutable_collection("intermediates") or "changes" in norm.variables):
        return None
    unit = norm.clone(parent=None, name=None, **without).apply({}, x, **options)
    _sow_input(norm, unit)
    return unit


class LayerNorm(OnLine, nn.LayerNorm):
    """y = x̂ s + b, open at x̂ and y."""

    def __call__(self, x, **options):
        unit = _unit(self, x, options, use_scale=False, use_bias=False)
        return _open_output(self, unit, super().__call__(x, **options))


class RMSNorm(OnLine, nn.RMSNorm):
    """y = x̂ s, open at x̂ and y."""

    def __call__(self, x, **options):
        unit = _unit(self, x, options, use_scale=False)
        return _open_output(self, unit, super().__call__(x, **options))


class ZeroCenteredRMSNorm(RMSNorm):
    """y = x̂ (1 + s), open at x̂ and y."""

    @nn.nowrap
    def param(self, *arguments, **options):
        return 1 + super().param(*arguments, **options)
