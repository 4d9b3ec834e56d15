"""Drawing a token from logits: temperature, top-k, top-p and min-p, all traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def sample_token(
    key: PRNGKeyArray,
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""] | float = 0.0,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token of softmax(f / temperature) within the filters, and its unfiltered log-probability.

        token = the first v with  Σ_{u ≤ v} exp(f_u / temperature) > U Σ_u exp(f_u / temperature)

    over the tokens that the filters keep, U uniform on [0, 1): those of `filtered` that are at
    least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    Temperature 0 is greedy. The log-probability, in nats, is that under softmax(f / temperature)
    before any filter, the quantity a teacher-forced pass computes; under softmax(f) when greedy.
    """
    return sample_within(key, logits, temperature, top_k, top_p, min_p)[:2]


def sample_within(
    key: PRNGKeyArray,
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""] | float = 0.0,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, "B V"], Float[Array, " B"]]:
    """`sample_token`, with the tokens that the filters kept, and the log of their probability."""
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, 1, temperature)
    off = (top_k <= 0) & (top_p >= 1)
    kept = jax.lax.cond(off, lambda f: f, lambda f: filtered(f, top_k, top_p), scaled)
    likeliest = scaled.max(axis=-1, keepdims=True)
    ratio = jnp.exp(kept - likeliest)
    mass = jnp.where(greedy, scaled == likeliest, jnp.where(ratio >= min_p, ratio, 0))
    uniforms = jax.random.uniform(key, (2, len(logits)), mass.dtype)
    token = categorical(jnp.where(greedy, 0, uniforms), mass)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    total = jax.nn.logsumexp(scaled, axis=-1)
    kept = mass > 0
    log_mass = jax.nn.logsumexp(jnp.where(kept, scaled, -jnp.inf), axis=-1) - total
    return token, chosen - total, kept, log_mass


def categorical(uniforms: Float[Array, "2 B"], mass: Float[Array, "B V"]) -> Int[Array, " B"]:
    """An index v of each row, drawn with probability mass_v / Σ mass by inverting the CDF twice.

    About √V neighbours make a block: the first uniform draws a block, the second an index in it.
    So a draw costs one pass over the vocabulary and two random numbers, where Gumbel noise costs V
    of them and two logarithms each; and a rare token's probability is not lost in the rounding of
    a sum over the vocabulary. An index without mass is never drawn.
    """
    size = mass.shape[1]
    width = block_width(size)
    blocks = jnp.pad(mass, ((0, 0), (0, -size % width))).reshape(len(mass), -1, width)
    block = _invert(uniforms[0], blocks.sum(axis=-1))
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * width + _invert(uniforms[1], chosen)


def block_width(size: int) -> int:
    """About √V: a power of two, or else what leaves no rest and the most even number of blocks.

    A vocabulary that is divided among devices is then cut between blocks, and a padding does not
    send it all to all. Of small vocabularies that is not worth a thought.
    """
    width = 1 << ((size - 1).bit_length() + 1) // 2
    near = [w for w in range(width // 4 + 1, 2 * width) if size % w == 0]
    if size % width == 0 or size < 1024 or not near:
        return width
    evenness = lambda w: (size // w) & -(size // w)  # the power of two in the number of blocks
    return max(near, key=lambda w: (evenness(w), -abs(w - width)))


def _invert(uniform: Float[Array, " B"], mass: Float[Array, "B K"]) -> Int[Array, " B"]:
    """The first index at which the sum of the mass up to it exceeds the uniform's share."""
    # A parallel sum need not be monotone: where there is no mass, nothing may be drawn.
    total = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0)
    reached = total > uniform[:, None] * total.max(axis=-1, keepdims=True)
    return jnp.argmax(reached, axis=-1).astype(jnp.int32)


def filtered(
    logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B V"]:
    """The logits with -inf outside the `top_k` likeliest tokens and then the nucleus `top_p`.

    The nucleus (Holtzman et al. 2020) is the smallest set of likeliest tokens whose probability,
    renormalised after top-k, reaches `top_p`; it always holds the likeliest. `top_k` <= 0 and
    `top_p` >= 1 are off. Tokens as likely as the last one kept are kept too.
    """
    size = logits.shape[-1]
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    kth = _largest_threshold(logits, lambda kept: kept.sum(axis=-1, keepdims=True) >= wanted)
    probs = jax.nn.softmax(jnp.where(logits >= kth, logits, -jnp.inf), axis=-1)
    mass = lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1, keepdims=True)
    nucleus = _largest_threshold(logits, lambda kept: mass(kept) >= top_p)
    smallest = jnp.where(top_p < 1, jnp.maximum(kth, nucleus), kth)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _largest_threshold(
    logits: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]
) -> Float[Array, "B 1"]:
    """The largest x for which the set {v: f_v >= x} is still `enough`, exactly.

    By bisection, which passes over the logits a few dozen times and is many times faster than
    sorting a vocabulary. It halves the range of the floats' places in their order, of which there
    are 2^32: a range of numbers, as wide as that of a logit that masks a token (-1e30, -inf), would
    have to be halved more often.
    """
    bits = jnp.finfo(logits.dtype).bits
    integer = jnp.dtype(f"int{bits}")
    # Read as integers, floats are in order from 0 on and in reverse below: turned round there.
    turned = lambda i: jnp.where(i < 0, i ^ jnp.iinfo(integer).max, i)
    place = lambda x: turned(jax.lax.bitcast_convert_type(x, integer))
    at = lambda i: jax.lax.bitcast_convert_type(turned(i), logits.dtype)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        holds = enough(logits >= at(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    lowest, highest = (place(f(logits, axis=-1, keepdims=True)) for f in (jnp.min, jnp.max))
    return at(jax.lax.fori_loop(0, bits, halve, (lowest, highest + 1))[0])
