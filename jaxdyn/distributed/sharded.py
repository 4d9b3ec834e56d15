"""The language model on a mesh: the same functions, told where rows and columns lie.

Every consumer of a `LanguageModel` (losses, sampler, kernels, probes) takes this one instead. XLA
derives the rest of a program from what enters and leaves the two functions:

    tokens, features    [B, ...]       B over ("data", "fsdp")
    logits              [B, ..., V]    B over "data", V over ("tensor", "fsdp"), as W is

so that the features of a few rows travel and W does not. Inside the body the opposite holds where
there are many slots: a layer's weights are gathered over "fsdp" and no activation is. A decoding
step has one slot a row, and there the activations travel and the weights stay.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdyn.distributed.mesh import ROWS
from jaxdyn.distributed.rules import fitting
from jaxdyn.models import LanguageModel
from jaxdyn.models.decoder import Attention
from jaxdyn.models.opened import Dense, Embed, LayerNorm, RMSNorm

SLOTS = P(ROWS)
LAYERS = (Dense, Embed, LayerNorm, RMSNorm)
DIVIDED = ("query", "key", "value", "up", "gate", "query_norm", "key_norm")
"""The layers of which each device computes its own columns, or heads, of the output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedModel(LanguageModel):
    """A `LanguageModel` whose programs run on `mesh`."""

    mesh: Mesh

    @property
    def shards(self) -> int:
        return self.mesh.size

    @property
    def row_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in ROWS)

    def features(self, backbone, tokens, mask):
        with self._placed():
            return super().features(backbone, self._rows(tokens), self._rows(mask))

    def logits(self, classifier, features):
        features = self._constrain(features, P("data"))
        if "weight" in classifier:  # a shared matrix lies as the embedding does
            weight = self._constrain(classifier["weight"], P(("tensor", "fsdp")))
            classifier = {**classifier, "weight": weight}
        logits = super().logits(classifier, features)
        columns = [None] * (logits.ndim - 2)
        return self._constrain(logits, P("data", *columns, ("tensor", "fsdp")))

    def opened(self, backbone, tokens, mask):
        with self._placed():
            return super().opened(backbone, self._rows(tokens), self._rows(mask))

    def streamed(self, backbone, tokens, mask):
        with self._placed():
            return super().streamed(backbone, self._rows(tokens), self._rows(mask))

    def open_block(self, block, number, x, mask):
        with self._placed():
            return super().open_block(block, number, self._rows(x), self._rows(mask))

    def itemized(self, backbone, change, t, tokens, mask):
        with self._placed():
            rows = self._rows(tokens), self._rows(mask)
            return super().itemized(backbone, change, t, *rows)

    def prefill(self, backbone, tokens, mask):
        with self._placed():
            features, cache = super().prefill(backbone, self._rows(tokens), self._rows(mask))
        return features, jax.tree.map(self._cached, cache)

    def decode(self, backbone, token, position, prompt, cache, mask, slot):
        with self._placed(P("data"), P("data", None, "fsdp")):
            features, cache = super().decode(backbone, token, position, prompt, cache, mask, slot)
        return self._rows(features), jax.tree.map(self._cached, cache)

    def _placed(self, rows: P = SLOTS, stream: P = SLOTS):
        """Layers traced inside leave their outputs [B, T, ...] where this mesh wants them."""

        def place(call, args, options, context):
            layer = context.module
            if isinstance(layer, Attention) and context.method_name == "attend":
                return call(*args) if layer.kind == "plain" else self._apart(call, *args)
            if isinstance(layer, Embed) and context.method_name == "look_up":
                parts = self._look_up(layer.embedding, *args)
                # One axis after another; in the other order XLA copies everything everywhere.
                return self._constrain(parts.astype(layer.dtype), P(*rows, None, "tensor"))
            output = call(*args, **options)
            if not isinstance(layer, LAYERS) or context.method_name != "__call__":
                return output
            divided = layer.name in DIVIDED
            return self._constrain(output, P(*rows, None, "tensor") if divided else stream)

        return nn.intercept_methods(place)

    def _apart(self, attend, query, key, value, mask):
        """A fused kernel, which XLA cannot divide: each device calls it for its rows and heads."""
        heads = fitting(P(ROWS, None, "tensor"), key.shape, self.mesh)
        of_mask = jax.tree.map(lambda x: fitting(P(ROWS), x.shape, self.mesh), mask)
        of_arguments = (heads, heads, heads, of_mask)
        # What the kernel says of the axes along which its results differ is not complete.
        over = functools.partial(jax.shard_map, mesh=self.mesh, check_vma=False)
        return over(attend, in_specs=of_arguments, out_specs=heads)(query, key, value, mask)

    def _look_up(self, table, ids):
        """Rows [B, T, D] of a table: each device looks up its part of them.

        In float32 or better, so that the rows' cotangents are added up in it.
        """
        table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
        of_table = fitting(P(None, ("tensor", "fsdp")), table.shape, self.mesh)
        of_ids = fitting(P("data"), ids.shape, self.mesh)
        of_parts = P(*of_ids or (None,), None, *of_table[1:])
        take = lambda table, ids: jnp.take(table, ids, axis=0)
        of_arguments = (of_table, of_ids)
        look_up = jax.shard_map(take, mesh=self.mesh, in_specs=of_arguments, out_specs=of_parts)
        return look_up(table, ids)

    def _cached(self, x):
        """Keys or values [L, B, heads, K, width]."""
        return self._constrain(x, P(None, ROWS, "tensor"))

    def _rows(self, tree):
        return jax.tree.map(lambda x: self._constrain(x, P(ROWS)), tree)

    def _constrain(self, x: Any, axes: P) -> Any:
        spec = fitting(axes, x.shape, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def shard_model(model: LanguageModel, mesh: Mesh) -> ShardedModel:
    """The same model on a mesh, with the attention of its devices."""
    model = model.on(mesh.devices.flat[0].platform)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(LanguageModel)}
    return ShardedModel(**fields, mesh=mesh)
