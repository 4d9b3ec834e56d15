"""The policy's probability of the tokens that a sampler's filters left, chunk by chunk."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from jaxdyn.rl.logprobs import scaled
from jaxdyn.rl.vocabulary import Cut, LogitsFn, number_of_chunks, vocabulary_chunk
from jaxdyn.types import Params


def support_log_mass(
    logits_fn: LogitsFn,
    classifier: Params,
    features: Float[Array, "*B D"],
    bits: UInt8[Array, "*B V8"],
    temperature: ArrayLike = 1.0,
    *,
    chunk: int | None = None,
    shards: int = 1,
) -> Float[Array, "*B"]:
    """log Σ_{v∈K} π(v), π = softmax(f / temperature) and K the tokens whose bits are set.

    In float32 or better. Any number where no bit is set. For the other arguments see
    `feature_statistics`.
    """
    vocab = jax.eval_shape(logits_fn, classifier, features).shape[-1]
    rows = features[..., 0].size
    chunk = vocabulary_chunk(-(-rows // shards), vocab) if chunk is None else chunk
    cut = Cut(logits_fn, vocab, number_of_chunks(vocab, chunk, shards) if chunk < vocab else 1)
    classifier = jax.tree.map_with_path(cut.pad, classifier)

    def of_chunk(number):
        z = scaled(logits_fn(cut.rows(classifier, number), features), temperature)
        columns = cut.columns(number, z.ndim)
        # Finite, so that what is nowhere is no NaN.
        never = jnp.finfo(z.dtype).min / 2
        z = jnp.where(columns < vocab, z, never)
        byte = jnp.take(bits, columns.ravel() // 8, axis=-1, mode="clip")
        kept = (byte >> (columns % 8).astype(jnp.uint8)) & 1
        inside = jnp.where((kept == 1) & (columns < vocab), z, never)
        return jax.nn.logsumexp(z, axis=-1), jax.nn.logsumexp(inside, axis=-1)

    whole, inside = jax.lax.map(of_chunk, jnp.arange(cut.chunks))
    return jax.nn.logsumexp(inside, axis=0) - jax.nn.logsumexp(whole, axis=0)
