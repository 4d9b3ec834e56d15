"""The language model as two pure functions: features φ of the backbone, logits f = Wφ."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.decoder import Backbone, Remat, one_block
from jaxdyn.models.fused import FUSED, AttentionKind
from jaxdyn.models.heads import init_gating
from jaxdyn.models.held import MATRICES, TABLE, held
from jaxdyn.models.products import rows_product
from jaxdyn.models.visibility import by_kind, positions_of, visible
from jaxdyn.types import KVCache, Mask, Params, View


@functools.lru_cache
def _output_shapes(module: Backbone, kinds: int) -> Params:
    """What every opened layer gives for one slot of one sequence, with so many kinds of masks."""
    one, masks = jnp.zeros((1, 1), jnp.int32), jnp.ones((kinds, 1, 1, 1, 1), bool)
    return jax.eval_shape(module.init, jax.random.key(0), one, one, masks)["perturbations"]


def _bare(tree: Params) -> Params:
    """A tree of opened layers' inputs or outputs, without these words for them; every head of a
    slot that is normalised by itself counts as a slot."""
    is_layer = lambda tree: "input" in tree or "output" in tree
    heads = lambda x, slots: x.reshape(*x.shape[:slots], -1, x.shape[-1])

    def array_of(path, layer):
        (x,) = layer.values()
        stacked = path and path[0].key == "layers"
        return x if x.ndim < 4 + bool(stacked) else heads(x, 1 + bool(stacked))

    return jax.tree_util.tree_map_with_path(array_of, tree, is_leaf=is_layer)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Pure functions over `{"backbone", "classifier"}`; hashable, so it can be a static argument.

    `dtype` is the compute dtype (float32 or bfloat16; float64 in oracles); parameters keep their
    own. `remat` trades time for memory wherever `features` is differentiated (`Backbone`).
    `attention` is plain unless the model was told where it runs (`on`, `shard_model`). With
    tied embeddings the stored `params["classifier"]` holds no weight: `view` puts the shared matrix
    there, every function below takes that view, and `fold` adds a view's gradient back onto the
    shared matrix.

    A caller that takes text from outside refuses token ids (padding's too) from
    `config.vocab_size` on and sequences beyond `config.max_positions`: neither can raise inside a
    compiled program. The first makes the sequence's features NaN, and so does the second with
    learned positions; rotary positions go on, untrained.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: Remat = "dots"
    stacked: bool = True
    attention: AttentionKind = "plain"

    def on(self, platform: str) -> "LanguageModel":
        """The same with the attention of a platform: of a "gpu" cuDNN's, of a "tpu" JAX's splash.

        `features` of a fused kernel have a gradient and no other derivative: see `unfused`. A model
        whose layers have a window keeps the plain one on a TPU, whose kernel here knows none.
        """
        kind = FUSED.get(platform, "plain")
        plain = kind == "splash" and self.config.window is not None
        return dataclasses.replace(self, attention="plain" if plain else kind)

    @property
    def unfused(self) -> "LanguageModel":
        """The same with plain attention, which has every derivative and any number of cotangents.

        What needs forward mode, or `vmap` of a pullback, takes this one; `opened` does by itself.
        """
        return dataclasses.replace(self, attention="plain")

    @property
    def shards(self) -> int:
        """Between how many devices the logits are divided."""
        return 1

    @property
    def row_shards(self) -> int:
        """Between how many devices the rows of a batch are divided, if their number allows it."""
        return 1

    # -- parameters ---------------------------------------------------------------------------

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: PRNGKeyArray) -> Params:
        """Random float32 parameters, as stored."""
        c = self.config
        body_key, head_key = jax.random.split(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        masks = visible(jnp.ones((1, 1), bool), c.window)
        backbone = Backbone(c, self.dtype).init(body_key, tokens, tokens, masks)
        classifier = {}
        if not c.tied:
            shape = (c.outputs, c.width)
            classifier["weight"] = 0.02 * jax.random.normal(head_key, shape, jnp.float32)
        if c.classifier_bias:
            classifier["bias"] = jnp.zeros(c.outputs, jnp.float32)
        params = {"backbone": backbone["params"], "classifier": classifier}
        if c.gating is not None:
            params["gating"] = init_gating(c.gating, c.width, c.outputs, head_key)
        return params

    def view(self, params: Params) -> View:
        """The parameters with the classifier's weight in place, tied or not."""
        if not self.config.tied:
            return View(params)
        weight = params["backbone"]["embed"]["embedding"]
        return View({**params, "classifier": {**params["classifier"], "weight": weight}})

    def rounded(self, view: View) -> View:
        """The view with the matrices of products in the compute dtype, as every pass rounds them.

        For a loop that takes them again and again: float32 weights that a decoding step in bfloat16
        rounds by itself cost it four times the bytes, where the compiler leaves that in the loop
        (XLA's for GPUs). Of the embedding's table a step reads a few rows.
        """
        return View(held(view, self.dtype, set(MATRICES) - {TABLE}))

    def fold(self, gradient: View) -> Params:
        """The stored parameters' gradient from a view's: a shared matrix gets both paths' sum."""
        if not self.config.tied:
            return gradient
        backbone, classifier = gradient["backbone"], dict(gradient["classifier"])
        shared = backbone["embed"]["embedding"] + classifier.pop("weight")
        backbone = {**backbone, "embed": {"embedding": shared}}
        return {**gradient, "backbone": backbone, "classifier": classifier}

    def untie(self, params: Params) -> tuple["LanguageModel", Params]:
        """The same function with a classifier of its own (a copy of the shared matrix)."""
        config = dataclasses.replace(self.config, tied=False)
        view = self.view(params)
        weight = jnp.array(view["classifier"]["weight"])
        params = {**params, "classifier": {**view["classifier"], "weight": weight}}
        return dataclasses.replace(self, config=config), params

    def unstack(self, params: Params) -> tuple["LanguageModel", Params]:
        """The same function with every layer's parameters apart, "layer_0" and so on, and no scan.

        For derivatives by other means than ours: neural-tangents follows it in four fifths of the
        time and half the memory. Our kernels, and files, know stacked layers alone.
        """
        backbone = dict(params["backbone"])
        layers = backbone.pop("layers")
        for i in range(self.config.num_layers):
            backbone[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
        return dataclasses.replace(self, stacked=False), {**params, "backbone": backbone}

    # -- the two functions --------------------------------------------------------------------

    def features(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Mask
    ) -> Float[Array, "B T D"]:
        """φ: the backbone's output at every slot; what a slot sees is `mask`'s to say."""
        return self._full_pass(backbone, tokens, mask, keep_cache=False)[0]

    def logits(self, classifier: Params, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """f = Wφ (+ b), accumulated and returned in float32 or better.

        With an adapter W is W + s b a, and f has s b (aφ) more.
        """
        wide = jnp.promote_types(self.dtype, jnp.float32)
        product = functools.partial(rows_product, dtype=self.dtype)
        *leading, width = features.shape
        features = features.reshape(-1, width)  # one axis of rows, as `matrix_product`
        logits = product(features, classifier["weight"])
        if "lora_a" in classifier:
            inner = product(features, classifier["lora_a"])
            logits += self.config.lora_scale * product(inner, classifier["lora_b"])
        if self.config.classifier_bias:
            logits = logits + classifier["bias"].astype(wide)[None]
        return logits.reshape(*leading, -1)

    def opened(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Mask
    ) -> tuple[Float[Array, "B T D"], Params, Callable[[Array], Params]]:
        """φ, the input of every layer that has parameters, and the way back to their outputs.

        The two trees have one leaf where `backbone` has a layer's parameters, and a leading axis L
        below "layers". Inputs are x of a dense layer x K + b, x̂ of a normalisation x̂ s + b or
        x̂ (1 + s), and the ids of an embedding, whose outputs are the table's rows. The function
        takes φ's cotangent to the cotangents of the layers' outputs, so that a parameter's gradient
        is a sum over slots of products of the two; it may be mapped over cotangents, since
        attention here is always the plain one.
        Where each head is normalised by itself, every head of a slot counts as a slot.
        """
        inputs = (tokens, positions_of(mask), visible(mask, self.config.window))
        still = self._no_shifts(tokens.shape)
        run = lambda shifts: self._opened_pass(backbone, shifts, *inputs)
        phi, pull, recorded = jax.vjp(run, still, has_aux=True)
        return phi, _bare(recorded), lambda cotangent: _bare(pull(cotangent)[0])

    def streamed(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Params, Callable[[Array], Params]]:
        """As `opened`, with every block as one layer: below "layers" are what the blocks read
        [L, B, T, D], and what they wrote. `open_block` has what is inside.
        """
        c = self.config
        inputs = (tokens, positions_of(mask), visible(mask, c.window))
        still = self._no_shifts(tokens.shape)
        blocks = jnp.zeros((c.num_layers, *tokens.shape, c.width), self.dtype)
        still["layers"] = {"output": blocks}
        run = lambda shifts: self._streamed_pass(backbone, shifts, *inputs)
        phi, pull, recorded = jax.vjp(run, still, has_aux=True)
        return phi, _bare(recorded), lambda cotangent: _bare(pull(cotangent)[0])

    def open_block(
        self, block: Params, number: Any, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]
    ) -> tuple[Params, Callable[[Array], Params]]:
        """Of one block that reads x, what its layers read, and the way back to what they wrote.

        The block's parameters have no axis of layers, nor have the trees, which are those below
        "layers" of `opened`; the function takes the cotangent of what the block writes.
        """
        inputs = (positions_of(mask), visible(mask, self.config.window))
        still = jax.tree.map(lambda z: z[0], self._no_shifts(mask.shape)["layers"])
        run = lambda shifts: self._block_pass(block, shifts, number, x, *inputs)
        _, pull, recorded = jax.vjp(run, still, has_aux=True)
        return _bare(recorded), lambda cotangent: _bare(pull(cotangent)[0])

    def _no_shifts(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Zeros that the opened layers add to what they write, for [B, T] slots."""

        def zeros(path, one):
            axis = 1 if path[0].key == "layers" else 0
            return jnp.zeros((*one.shape[:axis], *shape, *one.shape[axis + 2 :]), one.dtype)

        module = Backbone(self.config, self.dtype)
        shapes = _output_shapes(module, 1 + (self.config.window is not None))
        return dict(jax.tree_util.tree_map_with_path(zeros, shapes))

    def itemized(
        self, backbone: Params, change: Params, t: Any, tokens: Int[Array, "B T"], mask: Mask
    ) -> tuple[Float[Array, "B T D"], Callable[[Array], Params]]:
        """φ at θ + t Δ, and the way back from its cotangent to what each part of Δ does to a text.

        With h = ⟨cotangent, φ⟩ that is ⟨∂h_b/∂θ_p, Δ_p⟩ [B] of every parameter p outside the
        layers and [L, B] of one inside: a tree of `change`'s keys. θ + t Δ is formed a layer at a
        time, and the backward pass keeps what that of `features` does; it may be mapped over
        cotangents.
        """
        inputs = (tokens, positions_of(mask), visible(mask, self.config.window))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        several = lambda path, x: x.shape[:1] if path[0].key == "layers" else ()
        by_parameter = lambda function: jax.tree_util.tree_map_with_path(function, change)
        places = by_parameter(lambda path, x: jnp.full(several(path, x), t, x.dtype))
        items = by_parameter(lambda path, x: jnp.zeros((*several(path, x), len(tokens)), wide))
        run = lambda items: self._itemized_pass(backbone, change, places, items, *inputs)
        phi, pull = jax.vjp(run, items)
        return phi, lambda cotangent: pull(cotangent)[0]

    # -- decoding -----------------------------------------------------------------------------

    def prefill(
        self, backbone: Params, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Features of the prompts, and the cache of their S slots."""
        features, (keys, values) = self._full_pass(backbone, tokens, mask, keep_cache=True)
        return features, KVCache(keys.swapaxes(2, 3), values.swapaxes(2, 3))

    def decode(
        self,
        backbone: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        prompt: KVCache,
        cache: KVCache,
        mask: Bool[Array, "B K"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Features of one more token a sequence, which is written to `slot` of `cache`.

        Row p G + g continues prompt p: `prompt` has the P prompts' S slots, `cache` the C slots of
        the B = P G completions. `mask` says which of these S + C a row attends to, `slot` included.
        """
        module: Any = Backbone(self.config, self.dtype, stacked=self.stacked)
        places = position[:, None, None], positions_of(mask)[:, None]
        masks = by_kind(mask[:, None, None, :], *places, self.config.window)
        inputs = token[:, None], position[:, None], masks
        features, cache = module.apply({"params": backbone}, *inputs, prompt, cache, slot)
        return features[:, 0], cache

    # Programs of their own inside others: the many that contain them at the same shapes, and their
    # derivatives, trace them once. XLA inlines them.

    @functools.partial(jax.jit, static_argnames=("self", "keep_cache"))
    def _full_pass(self, backbone, tokens, mask, keep_cache: bool):
        module = Backbone(
            self.config, self.dtype, keep_cache, self.remat, self.stacked, self.attention
        )
        seen = visible(mask, self.config.window)
        return module.apply({"params": backbone}, tokens, positions_of(mask), seen)

    @functools.partial(jax.jit, static_argnames="self")
    def _opened_pass(self, backbone, shifts, tokens, positions, masks):
        variables = {"params": backbone, "perturbations": shifts}
        inputs = (tokens, positions, masks)
        # The backward pass keeps the dense layers' outputs alone: half the memory, no slower.
        module = Backbone(self.config, self.dtype, remat="dots")
        (phi, _), recorded = module.apply(variables, *inputs, mutable=["intermediates"])
        return phi, recorded["intermediates"]

    @functools.partial(jax.jit, static_argnames="self")
    def _streamed_pass(self, backbone, shifts, tokens, positions, masks):
        shifts = dict(shifts)
        blocks = {"layers": shifts.pop("layers")}
        variables = {"params": backbone, "perturbations": shifts, "shifts": blocks}
        inputs = (tokens, positions, masks)
        module = Backbone(self.config, self.dtype, remat="full")  # it keeps what blocks read
        (phi, _), recorded = module.apply(variables, *inputs, mutable=["intermediates", "stream"])
        return phi, {**recorded["intermediates"], **recorded["stream"]}

    @functools.partial(jax.jit, static_argnames="self")
    def _block_pass(self, block, shifts, number, x, positions, masks):
        variables = {"params": block, "perturbations": shifts}
        inputs = (number, x, positions, masks)
        return one_block(self.config, self.dtype, variables, *inputs)

    @functools.partial(jax.jit, static_argnames="self")
    def _itemized_pass(self, backbone, change, places, items, tokens, positions, masks):
        variables = {"params": backbone, "changes": change, "places": places, "items": items}
        module = Backbone(self.config, self.dtype, remat="dots")
        return module.apply(variables, tokens, positions, masks)[0]
