"""The body of the language model: one Flax decoder, scanned over its layers.

Every layer that has parameters can be opened (`jaxdyn.models.opened`).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxdyn.models.attention import attention, cached_attention
from jaxdyn.models.config import ModelConfig
from jaxdyn.models.fused import AttentionKind
from jaxdyn.models.opened import (
    RECORDS,
    Dense,
    Embed,
    LayerNorm,
    RMSNorm,
    ZeroCenteredRMSNorm,
    enter,
    leave,
)
from jaxdyn.models.products import matrix_product
from jaxdyn.models.rotary import rotary_kinds, rotary_tables, rotate
from jaxdyn.models.visibility import Seen
from jaxdyn.types import KVCache

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
    "relu": nn.relu,
}


Remat = Literal["none", "dots", "full"]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _dense(config: ModelConfig, features: int, bias: bool, dtype, name: str, residual=False):
    """A dense layer; those that write into the residual stream start smaller by 1/√(2L)."""
    std = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    return Dense(
        features,
        use_bias=False,
        biased=bias,
        dtype=dtype,
        kernel_init=nn.initializers.normal(std),
        dot_general=matrix_product,
        lora_scale=config.lora_scale,
        name=name,
    )


def _norm(config: ModelConfig, dtype, name: str):
    if config.norm == "rms":
        return RMSNorm(epsilon=config.norm_eps, dtype=dtype, name=name)
    if config.norm == "zero_centered_rms":
        still = nn.initializers.zeros
        return ZeroCenteredRMSNorm(
            epsilon=config.norm_eps, dtype=dtype, scale_init=still, name=name
        )
    return LayerNorm(epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class Layer(NamedTuple):
    """Which layer it is, and of which kind its rotary positions and its mask are, if of several."""

    number: Any
    rotary: Any
    mask: Any


def _layers(config: ModelConfig) -> tuple[Layer, Any]:
    """Every layer, in arrays to scan along, and the kinds of rotary positions."""
    kinds, rotary = rotary_kinds(config) if config.rotary_dim else ((), None)
    mask = np.array(config.windowed_by_layer)
    ids = lambda x: np.asarray(x, np.int32)
    of_several = lambda x, several: ids(x) if several else None
    numbers = ids(np.arange(config.num_layers))
    layers = Layer(numbers, of_several(rotary, len(kinds) > 1), of_several(mask, mask.any()))
    return layers, kinds


def _the_one(arrays):
    """Where there is one kind, its arrays; a slice inside the layers would be copied by each."""
    return jax.tree.map(lambda x: x[0] if len(x) == 1 else x, arrays)


def _of_kind(arrays, kind):
    """Those of that kind, of several along the first axis."""
    if kind is None:
        return arrays
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, kind, keepdims=False), arrays)


def _tables(config: ModelConfig, kinds, positions, dtype):
    """Of every kind of rotary positions, or None where positions are learned."""
    return _the_one(rotary_tables(kinds, positions, dtype)) if config.rotary_dim else None


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    kind: AttentionKind

    def attend(self, query, key, value, mask):
        return attention(query, key, value, mask, self.kind)

    @nn.compact
    def __call__(self, x, tables, masks, prompt, cache, slot, layer):
        c = self.config

        def project(name: str, heads: int, normed: str = c.query_key_norm):
            norm = lambda y, what: _norm(c, self.dtype, f"{name}_norm")(y) if normed == what else y
            y = norm(_dense(c, heads * c.head_dim, c.qkv_bias, self.dtype, name)(x), "projection")
            return norm(y.reshape(*x.shape[:2], heads, c.head_dim), "head")

        query, key = project("query", c.num_heads), project("key", c.num_kv_heads)
        value = project("value", c.num_kv_heads, "none")
        if tables is not None:
            cos, sin = _of_kind(tables, layer.rotary)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if c.attention_scalar is not None:
            query = query * (c.head_dim / c.attention_scalar) ** 0.5
        mask = _of_kind(masks, layer.mask)
        written = (key, value)
        if cache is None:
            mixed = self.attend(query, key, value, mask)
        else:
            zero = jnp.int32(0)  # of the others' type, in float64 runs too
            start = (layer.number, zero, zero, slot, zero)
            update = jax.lax.dynamic_update_slice
            write = lambda old, new: update(old, new.swapaxes(1, 2)[None], start)
            read = lambda x: jax.lax.dynamic_index_in_dim(x, layer.number, keepdims=False)
            cache = KVCache(write(cache.keys, key), write(cache.values, value))
            held = prompt.keys, prompt.values, cache.keys, cache.values
            old_keys, old_values, keys, values = map(read, held)
            mixed = cached_attention(query, old_keys, old_values, keys, values, mask)
        mixed = mixed.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        out = _dense(c, c.width, c.attention_out_bias, self.dtype, "out", residual=True)(mixed)
        return out, cache, written


class Mlp(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        activation = _ACTIVATIONS[c.activation]
        hidden = _dense(c, c.mlp_width, c.mlp_bias, self.dtype, "up")(x)
        if c.gated_mlp:
            gate = _dense(c, c.mlp_width, c.mlp_bias, self.dtype, "gate")(x)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        return _dense(c, c.width, c.mlp_bias, self.dtype, "down", residual=True)(hidden)


class Block(nn.Module):
    """One layer, shaped for `nn.scan`: the carry is (x, cache), `layer` says which one."""

    config: ModelConfig
    dtype: Any
    keep_cache: bool
    attention: AttentionKind

    @nn.compact
    def __call__(self, carry, layer, tables, masks, prompt, slot):
        x, cache = enter(self, carry[0]), carry[1]
        c = self.config
        norm = lambda name, there: _norm(c, self.dtype, name) if there else lambda x: x
        before, after = c.norm_placement != "after", c.norm_placement != "before"
        mixed, cache, written = Attention(c, self.dtype, self.attention, name="attention")(
            norm("attention_norm", before)(x), tables, masks, prompt, cache, slot, layer
        )
        mixed = norm("attention_post_norm", after)(mixed)
        mlp_norm, mlp_post_norm = norm("mlp_norm", before), norm("mlp_post_norm", after)
        mlp = Mlp(c, self.dtype, name="mlp")
        if c.parallel_residual:
            x = x + mixed + mlp_post_norm(mlp(mlp_norm(x)))
        else:
            x = x + mixed
            x = x + mlp_post_norm(mlp(mlp_norm(x)))
        return (leave(self, x), cache), (written if self.keep_cache else None)


class Backbone(nn.Module):
    """Everything up to and including the final normalisation: tokens -> features φ.

    Three uses of one module: a full pass; a full pass that also returns each layer's keys and
    values (`keep_cache`); and one step on the caches of `prompt` and completion, writing to the
    latter's `slot`. `masks` are that of whole layers and, if the model has some, that of those with
    a window.

    `remat` says what a full pass keeps for its backward pass, which computes the rest again:
    each layer's input and dense outputs ("dots"), its input alone ("full"), or all but the
    attention's weights ("none"). "dots" is also the fastest on a CPU: what is cheap to compute is
    dearer to write to the layers' stack and read back.

    Unless `stacked`, each layer has parameters of its own, "layer_0" and so on, and no scan.
    `attention` is a full pass's.
    """

    config: ModelConfig
    dtype: Any
    keep_cache: bool = False
    remat: Remat = "none"
    stacked: bool = True
    attention: AttentionKind = "plain"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "kinds B 1 T K"] | Seen,
        prompt: KVCache | None = None,
        cache: KVCache | None = None,
        slot: Any = 0,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        init = nn.initializers.normal(0.02)
        embed = lambda n, name: Embed(n, c.width, dtype=self.dtype, embedding_init=init, name=name)
        x = embed(c.vocab_size, "embed")(tokens)
        if c.scaled_embedding:
            x = x * c.width**0.5
        layers, kinds = _layers(c)
        tables = _tables(c, kinds, positions, x.dtype)
        if tables is None:
            x = x + embed(c.max_positions, "position")(positions)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[self.remat])
        layer = lambda kind, name: kind(c, self.dtype, self.keep_cache, self.attention, name=name)
        carry, still = (x, cache), (tables, _the_one(masks), prompt, slot)
        if self.stacked:
            scanned = nn.scan(
                block,
                variable_axes={name: 0 for name in ("params", *RECORDS)},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                check_constancy_invariants=False,  # they hold; else every layer is traced twice
            )
            carry, written = layer(scanned, "layers")(carry, layers, *still)
        else:
            each = []
            for i in range(c.num_layers):
                this = jax.tree.map(lambda x, i=i: x[i], layers)
                carry, kept = layer(block, f"layer_{i}")(carry, this, *still)
                each.append(kept)
            written = jax.tree.map(lambda *x: jnp.stack(x), *each)
        x, cache = carry
        return _norm(c, self.dtype, "norm")(x), (written if self.keep_cache else cache)


def one_block(config: ModelConfig, dtype, variables, number, x, positions, masks):
    """What one of the scanned blocks writes, of what it reads, and what its layers read.

    Args:
      variables: the block's own, without the axis of layers.
      number: which it is.
    """
    layers, kinds = _layers(config)
    this = jax.tree.map(lambda of_layers: jnp.asarray(of_layers)[number], layers)
    still = _tables(config, kinds, positions, x.dtype), _the_one(masks), None, 0
    block: Any = Block(config, dtype, keep_cache=False, attention="plain")
    given = (variables, (x, None), this, *still)
    ((x, _), _), recorded = block.apply(*given, mutable=["intermediates"])
    return x, recorded["intermediates"]
