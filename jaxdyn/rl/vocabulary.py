"""Per-token statistics in vocabulary chunks: exact, never B x T x V numbers at once.

The vocabulary is cut into chunks c of K columns. Chunk c has the policy's mass q_c and, within
it, an entropy H_c; with ℓ_c = log Σ_{v in c} exp z_v of the scaled logits z = f / temperature,

    ℓ = log Σ_c exp ℓ_c        log q_c = ℓ_c - ℓ        H = Σ_c q_c (H_c - log q_c)

so that a chunk leaves a few numbers a row. The backward pass computes each chunk's logits again,
and their cotangent from those of the entropy, h, and of the log-probabilities at the sampled
column and at the two largest, a_k at column y_k:

    dz_v = Σ_k a_k (1[v = y_k] - π_v) - h π_v (log π_v + H)

That is four products of the logits' size, where keeping the logits takes three.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxdyn.rl.logprobs import (
    Summary,
    TokenStatistics,
    scaled,
    statistics_of,
    summarise,
    token_statistics,
    top_two,
)
from jaxdyn.types import Params

LogitsFn = Callable[[Params, jax.Array], jax.Array]

CHUNK_BYTES = 64 * 2**20
"""What a chunk's float32 logits may take; a pass holds up to four arrays of that size."""


def feature_statistics(
    logits_fn: LogitsFn,
    classifier: Params,
    features: Float[Array, "*B D"],
    ids: Int[Array, "*B"],
    temperature: ArrayLike = 1.0,
    *,
    chunk: int | None = None,
) -> TokenStatistics:
    """`token_statistics` of f = `logits_fn(classifier, features)`, in chunks of the vocabulary.

    Gradients are exact for the classifier and the features; the temperature gets none. A
    vocabulary of one chunk (`chunk` columns; by default `vocabulary_chunk`) keeps its logits for
    the backward pass; else they are computed twice, and reverse mode is the only one.

    Every leaf of `classifier` has the vocabulary as its leading axis, and `logits_fn` of some of
    its rows gives their logits; but leaves named "lora_a" belong to all rows.
    """
    vocab = jax.eval_shape(logits_fn, classifier, features).shape[-1]
    chunk = vocabulary_chunk(ids.size, vocab) if chunk is None else chunk
    wide = jnp.promote_types(features.dtype, jnp.float32)
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, wide))
    if chunk >= vocab:
        return token_statistics(logits_fn(classifier, features), ids, temperature)
    cut = Cut(logits_fn, vocab, chunk)
    return statistics_of(*chunked_log_probs(cut, classifier, features, ids, temperature))


def vocabulary_chunk(rows: int, vocab: int) -> int:
    """Columns a chunk: all of them if `rows` rows' float32 logits fit `CHUNK_BYTES`.

    Else the fewest even chunks that fit, in multiples of 128. Beyond 16 Ki rows a chunk keeps
    1024 columns and exceeds it: thinner products would wait for their features rather than for
    arithmetic, and the chunk is then about as large as the features themselves.
    """
    fitting = CHUNK_BYTES // (4 * rows)
    if vocab <= fitting:
        return vocab
    most = max(fitting // 128 * 128, 1024)
    even = -(-vocab // -(-vocab // most))
    return min(-(-even // 128) * 128, vocab)


class Cut(NamedTuple):
    """How the vocabulary is cut: the last chunk begins early enough to be whole."""

    logits_fn: LogitsFn
    vocab: int
    chunk: int

    @property
    def begins(self) -> jax.Array:
        """The first column of each chunk that no chunk before it has."""
        return jnp.arange(0, self.vocab, self.chunk)

    def start(self, begin: jax.Array) -> jax.Array:
        """The first column of the chunk: for the last one, before its `begin`."""
        return jnp.minimum(begin, self.vocab - self.chunk)

    def rows(self, classifier: Params, begin: jax.Array) -> Params:
        """The chunk's rows of the classifier."""
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, self.start(begin), self.chunk)
        return jax.tree.map_with_path(lambda path, x: x if shared(path) else take(x), classifier)

    def columns(self, begin: jax.Array, ndim: int) -> jax.Array:
        """The chunk's columns, along the last of `ndim` axes."""
        return (self.start(begin) + jnp.arange(self.chunk)).reshape((1,) * (ndim - 1) + (-1,))


def shared(path: tuple) -> bool:
    """Whether the classifier's leaf at `path` belongs to every row of the vocabulary."""
    return path[-1] == jax.tree_util.DictKey("lora_a")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_log_probs(
    cut: Cut,
    classifier: Params,
    features: Float[Array, "*B D"],
    ids: Int[Array, "*B"],
    temperature: Float[Array, ""],
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B 2"]]:
    """log π of `ids`, entropy, and the two largest log π, one chunk after another."""
    return _forward(cut, classifier, features, ids, temperature)[0]


def _forward(cut: Cut, classifier, features, ids, temperature):
    def of_chunk(begin):
        z = scaled(cut.logits_fn(cut.rows(classifier, begin), features), temperature)
        columns = cut.columns(begin, z.ndim)
        # A column met before weighs exp(-huge) = 0; finite, so that 0 times it is 0.
        z = jnp.where(columns < begin, jnp.finfo(z.dtype).min / 2, z)
        local = jnp.clip(ids - cut.start(begin), 0, cut.chunk - 1)
        chosen = jnp.take_along_axis(z, local[..., None], axis=-1)[..., 0]
        mine = (begin <= ids) & (ids < begin + cut.chunk)
        return summarise(z, columns), jnp.where(mine, chosen, 0)

    parts, chosen = jax.lax.map(of_chunk, cut.begins)
    whole = merge(parts)
    logps = jnp.sum(chosen, axis=0) - whole.peak - whole.log_total
    return (logps, whole.entropy, whole.top - whole.log_total[..., None]), whole


def merge(parts: Summary) -> Summary:
    """The summary of all chunks from theirs, which are stacked along the first axis."""
    peak = jnp.max(parts.peak, axis=0)
    rise = parts.peak - peak[None]
    log_total = jax.nn.logsumexp(rise + parts.log_total, axis=0)
    log_mass = rise + parts.log_total - log_total[None]
    entropy = jnp.sum(jnp.exp(log_mass) * (parts.entropy - log_mass), axis=0)
    beside = lambda x: jnp.concatenate(jnp.unstack(x), axis=-1)
    top, at = top_two(beside(rise[..., None] + parts.top), beside(parts.at))
    return Summary(peak, log_total, entropy, top, at)


def _forward_to_differentiate(cut: Cut, *primals):
    primals = jax.tree.map(lambda x: x.value, primals)
    log_probs, whole = _forward(cut, *primals)
    return log_probs, (primals, whole)


def _backward(cut: Cut, kept, cotangents):
    (classifier, features, ids, temperature), whole = kept
    wide = whole.entropy.dtype
    # What no loss depends on has a cotangent that is zero by type, and costs nothing.
    d_logps, d_entropy, d_top = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    terms = [] if d_logps is None else [(ids, d_logps)]
    if d_top is not None:
        terms += [(whole.at[..., k], d_top[..., k]) for k in range(2)]

    def cotangent_of(f, begin):
        columns = cut.columns(begin, f.ndim)
        # One after the other: their sum would round what large logits leave of log_total.
        shifted = scaled(f, temperature) - whole.peak[..., None]
        log_probs = shifted - whole.log_total[..., None]
        dz = sum(jnp.where(columns == at[..., None], a[..., None], 0) for at, a in terms)
        weight = sum(a[..., None] for _, a in terms)
        if d_entropy is not None:
            weight += d_entropy[..., None] * (log_probs + whole.entropy[..., None])
        dz = jnp.where(columns < begin, 0, dz - jnp.exp(log_probs) * weight)
        return scaled(dz, temperature).astype(f.dtype)

    def add(begin, path, total, part):
        if shared(path):
            return total + part.astype(total.dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, part, cut.start(begin), axis=0)

    def step(total, begin):
        f, pull = jax.vjp(cut.logits_fn, cut.rows(classifier, begin), features)
        d_rows, d_features = pull(cotangent_of(f, begin))
        place = functools.partial(add, begin)
        d_classifier = jax.tree.map_with_path(place, total[0], d_rows)
        return (d_classifier, total[1] + d_features.astype(wide)), None

    zeros = lambda path, x: jnp.zeros(x.shape, wide if shared(path) else x.dtype)
    total = jax.tree.map_with_path(zeros, classifier), jnp.zeros(features.shape, wide)
    # From the last chunk to the first: each then overwrites the zeros of columns met before.
    total = jax.lax.scan(step, total, cut.begins, reverse=True)[0]
    cast = lambda d, x: d.astype(x.dtype)
    return *jax.tree.map(cast, total, (classifier, features)), None, None


chunked_log_probs.defvjp(_forward_to_differentiate, _backward, symbolic_zeros=True)
