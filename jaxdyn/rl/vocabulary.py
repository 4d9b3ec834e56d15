"""Per-token statistics in vocabulary chunks: exact, never B x T x V numbers at once.

The vocabulary is cut into n chunks c of every n-th column. Chunk c has the policy's mass q_c and,
within it, an entropy H_c; with ℓ_c = log Σ_{v in c} exp z_v of the scaled logits
z = f / temperature,

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
    shards: int = 1,
) -> TokenStatistics:
    """`token_statistics` of f = `logits_fn(classifier, features)`, in chunks of the vocabulary.

    Gradients are exact for the classifier and the features; the temperature gets none. A
    vocabulary of one chunk (`chunk` columns; by default `vocabulary_chunk`) keeps its logits for
    the backward pass; else they are computed twice, and reverse mode is the only one. `shards` is
    the number of devices between which the logits are divided.

    Every leaf of `classifier` has the vocabulary as its leading axis, and `logits_fn` of some of
    its rows gives their logits; but leaves named "lora_a" belong to all rows.
    """
    vocab = jax.eval_shape(logits_fn, classifier, features).shape[-1]
    chunk = vocabulary_chunk(-(-ids.size // shards), vocab) if chunk is None else chunk
    wide = jnp.promote_types(features.dtype, jnp.float32)
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, wide))
    if chunk >= vocab:
        return token_statistics(logits_fn(classifier, features), ids, temperature)
    cut = Cut(logits_fn, vocab, number_of_chunks(vocab, chunk, shards))
    classifier = jax.tree.map_with_path(cut.pad, classifier)
    return statistics_of(*chunked_log_probs(cut, classifier, features, ids, temperature))


def vocabulary_chunk(rows: int, vocab: int) -> int:
    """Columns a chunk: all of them if `rows` rows' float32 logits fit `CHUNK_BYTES`.

    Else as many as fit. Beyond 16 Ki rows a chunk keeps 1024 columns and exceeds it: thinner
    products would wait for their features rather than for arithmetic, and the chunk is then about
    as large as the features themselves.
    """
    return min(max(CHUNK_BYTES // (4 * rows), 1024), vocab)


def number_of_chunks(vocab: int, most: int, shards: int) -> int:
    """Chunks of `most` columns or fewer: if twice as many or fewer do, some that divide evenly.

    Evenly: every one of `shards` equal parts of the vocabulary has as much of each chunk.
    """
    fewest = -(-vocab // most)
    even = (n for n in range(fewest, 2 * fewest) if vocab % (n * shards) == 0)
    return next(even, fewest)


class Cut(NamedTuple):
    """How the vocabulary is cut: chunk c of n has the columns c, c + n, c + 2n, …

    A part of the vocabulary on another device then has its part of every chunk.
    """

    logits_fn: LogitsFn
    vocab: int
    chunks: int

    @property
    def columns_each(self) -> int:
        return -(-self.vocab // self.chunks)

    def pad(self, path: tuple, x: jax.Array) -> jax.Array:
        """The classifier's leaf with as many rows as the chunks have columns."""
        missing = self.chunks * self.columns_each - self.vocab
        if shared(path) or not missing:
            return x
        return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])

    def by_chunk(self, x: jax.Array) -> jax.Array:
        """[V, ...] as [V / n, n, ...]."""
        return x.reshape(-1, self.chunks, *x.shape[1:])

    def rows(self, classifier: Params, chunk: jax.Array) -> Params:
        """The chunk's rows of the classifier."""
        take = lambda x: jax.lax.dynamic_index_in_dim(self.by_chunk(x), chunk, 1, keepdims=False)
        return jax.tree.map_with_path(lambda path, x: x if shared(path) else take(x), classifier)

    def columns(self, chunk: jax.Array, ndim: int) -> jax.Array:
        """The chunk's columns, along the last of `ndim` axes."""
        places = chunk + self.chunks * jnp.arange(self.columns_each)
        return places.reshape((1,) * (ndim - 1) + (-1,))


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
    def of_chunk(chunk):
        z = scaled(cut.logits_fn(cut.rows(classifier, chunk), features), temperature)
        columns = cut.columns(chunk, z.ndim)
        # A column of the padding weighs exp(-huge) = 0; finite, so that 0 times it is 0.
        z = jnp.where(columns < cut.vocab, z, jnp.finfo(z.dtype).min / 2)
        chosen = jnp.take_along_axis(z, (ids // cut.chunks)[..., None], axis=-1)[..., 0]
        return summarise(z, columns), jnp.where(ids % cut.chunks == chunk, chosen, 0)

    parts, chosen = jax.lax.map(of_chunk, jnp.arange(cut.chunks))
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

    def cotangent_of(f, chunk):
        columns = cut.columns(chunk, f.ndim)
        # One after the other: their sum would round what large logits leave of log_total.
        shifted = scaled(f, temperature) - whole.peak[..., None]
        log_probs = shifted - whole.log_total[..., None]
        dz = sum(jnp.where(columns == at[..., None], a[..., None], 0) for at, a in terms)
        weight = sum(a[..., None] for _, a in terms)
        if d_entropy is not None:
            weight += d_entropy[..., None] * (log_probs + whole.entropy[..., None])
        dz = jnp.where(columns < cut.vocab, dz - jnp.exp(log_probs) * weight, 0)
        return scaled(dz, temperature).astype(f.dtype)

    def step(total, chunk):
        f, pull = jax.vjp(cut.logits_fn, cut.rows(classifier, chunk), features)
        d_rows, d_features = pull(cotangent_of(f, chunk))

        def place(path, total, part):
            if shared(path):
                return total + part.astype(total.dtype)
            return jax.lax.dynamic_update_index_in_dim(total, part, chunk, axis=1)

        d_classifier = jax.tree.map_with_path(place, total[0], d_rows)
        return (d_classifier, total[1] + d_features.astype(wide)), None

    def zeros(path, x):
        return jnp.zeros_like(x, wide) if shared(path) else jnp.zeros_like(cut.by_chunk(x))

    total = jax.tree.map_with_path(zeros, classifier), jnp.zeros(features.shape, wide)
    total = jax.lax.scan(step, total, jnp.arange(cut.chunks))[0]
    as_given = lambda d, x: d.reshape(x.shape).astype(x.dtype)
    return *jax.tree.map(as_given, total, (classifier, features)), None, None


chunked_log_probs.defvjp(_forward_to_differentiate, _backward, symbolic_zeros=True)
