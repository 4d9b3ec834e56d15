"""What passes between rooms: a model's contract, and arrays as frozen pytrees of documented shapes.

One alphabet throughout the package:

    P  prompts               G  generations per prompt      B  sequences (B = P * G in a rollout)
    S  prompt slots          C  completion slots            T  token slots of a sequence (T = S + C)
    D  feature width         V  vocabulary                  L  layers             N  sites

Sequences are padded on either side; a mask says which slots hold a token (`Mask`). Rollouts are
padded on the left up to S and on the right after the completion, so that a completion always
starts at slot S.
"""

from collections.abc import Callable
from typing import Any, NewType, Protocol, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from jaxdyn import COMPONENTS as COMPONENTS
from jaxdyn.errors import JaxdynError as JaxdynError

Params = dict[str, Any]
"""Parameters as stored and trained, `{"backbone": ..., "classifier": ...}`, tied or not.

Every public function takes these. The classifier of a tied model holds no weight of its own.
"""

View = NewType("View", dict[str, Any])
"""Parameters with the classifier's weight in place, as the model's two functions take them.

A function makes it at its door (`Model.view`), and it goes no further: a gradient with respect to a
view keeps the two roles of a tied matrix apart, and `Model.fold` puts them together again.
"""


@struct.dataclass
class Branches:
    """Which slots hold a token in P rows that are each a prompt and G completions of it.

    A row has S + G C slots: the prompt's, and each completion's C one after another. A completion's
    token sees the prompt and its own completion up to itself, and its position counts on from the
    prompt's last: it is computed as in a row of S + C slots of its own, and the prompt once.

    With `packed` there are R rows of P/R prompts, S slots each, and then M slots for what their
    completions hold, one after another without padding: the number of each among their P/R G C
    slots, in order, and -1 where nothing is left.
    """

    prompt: Bool[Array, "P S"]
    completions: Bool[Array, "P G C"]
    packed: Int[Array, "R M"] | None = None


Mask = Bool[Array, "B T"] | Int[Array, "B T"] | Branches
"""Which slots of a row hold a token, and which of these a token sees.

Of booleans, a row holds one sequence, and a token sees those up to itself. Of integers, a row holds
several sequences one after another, each under a number of its own from 1 on, and 0 is padding;
a token sees those of its own sequence. `Branches` are a prompt with its completions.
"""


@runtime_checkable
class Sizes(Protocol):
    """What every room may ask of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def classifier_bias(self) -> bool: ...
    @property
    def lora_scale(self) -> float: ...


@runtime_checkable
class Model(Protocol):
    """A language model as two pure functions of the two halves of its parameters' view.

        features : view["backbone"],   tokens -> φ      [B, T, D]
        logits   : view["classifier"], φ      -> f = Wφ [B, T, V]

    Hashable, so that it can be a static argument. `jaxdyn.models.LanguageModel` is one, and
    `jaxdyn.distributed.ShardedModel` another, on a mesh.
    """

    def __hash__(self) -> int: ...
    @property
    def config(self) -> Sizes: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def shards(self) -> int:
        """Between how many devices the logits are divided."""

    @property
    def unfused(self) -> "Model":
        """The same functions with every derivative: forward mode, and many cotangents at once."""

    @property
    def row_shards(self) -> int:
        """Between how many devices the rows of a batch are divided, if their number allows it."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Random float32 parameters, as stored."""

    def view(self, params: Params) -> View:
        """The parameters with the classifier's weight in place, tied or not."""

    def rounded(self, view: View) -> View:
        """The view with the matrices of products in the compute dtype: the same numbers."""

    def fold(self, gradient: View) -> Params:
        """The stored parameters' gradient from a view's: a shared matrix gets both roles' sum."""

    def features(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Mask
    ) -> Float[Array, "B T D"]:
        """φ at every slot; `mask` says which hold a token, and what of its row a token sees."""

    def logits(self, classifier: Params, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """f = Wφ (+ b), in float32 or better."""

    def opened(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Mask
    ) -> tuple[Float[Array, "B T D"], Params, Callable[[Array], Params]]:
        """φ, every layer's input, and the way back from φ's cotangent to the outputs' ones."""

    def streamed(
        self, backbone: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Params, Callable[[Array], Params]]:
        """The same with every block as one layer."""

    def open_block(
        self, block: Params, number: Any, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]
    ) -> tuple[Params, Callable[[Array], Params]]:
        """Of one block that reads x its layers' inputs, and the way back to their outputs."""

    def itemized(
        self, backbone: Params, change: Params, t: Any, tokens: Int[Array, "B T"], mask: Mask
    ) -> tuple[Float[Array, "B T D"], Callable[[Array], Params]]:
        """φ at θ + t Δ, and the way back from its cotangent to what each of Δ does, by text."""

    def prefill(
        self, backbone: Params, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], "KVCache"]:
        """Features of the prompts, and the cache of their S slots."""

    def decode(
        self,
        backbone: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        prompt: "KVCache",
        cache: "KVCache",
        mask: Bool[Array, "B K"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], "KVCache"]:
        """Features of one more token a sequence, which is written to `slot` of `cache`."""


@struct.dataclass
class PromptBatch:
    """P tokenised prompts, padded on the left to S slots."""

    prompt_ids: Int[Array, "P S"]
    prompt_mask: Bool[Array, "P S"]


@struct.dataclass
class Support:
    """The tokens that top-k, top-p and min-p left the sampler at every slot of a completion.

    `bits` has a bit a token of the vocabulary, eight to a byte and the first lowest; `log_mass` is
    the log of what the sampler's softmax(f / temperature) gives to all of them.
    """

    bits: UInt8[Array, "B C V8"]
    log_mass: Float[Array, "B C"]


@struct.dataclass
class Rollout:
    """B sampled completions. Row p * G + g is generation g of prompt p.

    `completion_mask` covers the sampled tokens up to and including the stop token, or the one that
    completes a stop string. `per_token_logps` is log softmax(f / temperature) at the sampled token,
    before any filter: the quantity a teacher-forced pass computes. `features`, if they were
    harvested, are the φ that predicted each token, and 0 in the slots after a completion's end.
    `support`, if it was asked for, is what the filters left.
    """

    prompt_ids: Int[Array, "B S"]
    prompt_mask: Bool[Array, "B S"]
    completion_ids: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]
    per_token_logps: Float[Array, "B C"]
    features: Float[Array, "B C D"] | None = None
    support: Support | None = None

    @property
    def tokens(self) -> jax.Array:
        """Prompt and completion side by side, [B, S + C]."""
        return jax.numpy.concatenate([self.prompt_ids, self.completion_ids], axis=1)

    @property
    def mask(self) -> jax.Array:
        """Which slots of `tokens` hold a token, [B, S + C]."""
        return jax.numpy.concatenate([self.prompt_mask, self.completion_mask], axis=1)


@struct.dataclass
class Sites:
    """N places where one token is predicted, inside B sequences.

    Site n sits at slot `positions[n]` of sequence `rows[n]`: its feature is the backbone's output
    there, and `targets[n]` is the token that follows. `is_prompt[n]` marks a prompt's last token,
    where the completion begins; the other sites lie inside completions. Inside a program the
    sequences may branch; whoever takes sites from outside takes one a row.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"] | Branches
    rows: Int[Array, " N"]
    positions: Int[Array, " N"]
    targets: Int[Array, " N"]
    is_prompt: Bool[Array, " N"]


@struct.dataclass
class KVCache:
    """Keys and values of every layer, `[L, B, kv_heads, K, head_dim]`, for K cache slots.

    Heads come before slots, so that a decoding step reads each head's keys in one stretch.
    """

    keys: Float[Array, "L B heads K width"]
    values: Float[Array, "L B heads K width"]


@struct.dataclass
class Components:
    """A quantity split by the path through which the parameters move it.

    representation: through the classifier W.  gradient: through the backbone.  cross: for tied
    embeddings, the product of the two paths (zero when untied).  They add up to `total` exactly.
    """

    representation: jax.Array
    gradient: jax.Array
    cross: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.representation + self.gradient + self.cross
