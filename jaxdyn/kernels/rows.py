"""Rows: the functions of the logits whose gradients the kernels compare, one sequence a row.

Two sites of one sequence are two rows, since their cotangents must not mix. Whatever a caller can
get wrong about them is found here, before anything heavy runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.types import JaxdynError, Model, Rollout, Sites


class Rows(NamedTuple):
    """N rows of K functions of the logits at S slots: Σ_s g[n, k, s]ᵀ f(positions[n, s]).

    The logit cotangents g are `given`; or those of single logits, `chosen`; or those of `both`
    statistics of the policy, Σ_s both[n, k, s, 0] log π(targets[n, s]) + both[n, k, s, 1] H, H the
    entropy and π = softmax(f / temperatures[n]); or, with none of these, those of
    Σ_s weights[n, s] log π(targets[n, s]), which are weights · (e_target − π) and K = 1.
    """

    tokens: Any  # [N, T]
    mask: Any  # [N, T]
    positions: Any  # [N, S]
    targets: Any  # [N, S]
    weights: Any  # [N, S]
    given: Any = None  # [N, S, V], K = 1
    chosen: Any = None  # [N, K]
    both: Any = None  # [N, K, S, 2]
    temperatures: Any = None  # [N], with `both`

    @property
    def outputs(self) -> int:
        """K."""
        several = [x.shape[1] for x in (self.chosen, self.both) if x is not None]
        return several[0] if several else 1

    def take(self, start: int, size: int) -> "Rows":
        """`size` rows from `start`; past the end the last row again, so that shapes stay."""
        which = np.minimum(np.arange(start, start + size), len(self.tokens) - 1)
        return jax.tree.map(lambda x: x[which], self)


def logit_cotangents(row: Rows, logits: jax.Array) -> jax.Array:
    """g [K, S, V] of one row (no leading N), from its logits [S, V]."""
    vocab = logits.shape[1]
    if row.given is not None:
        return row.given[None].astype(logits.dtype)
    if row.chosen is not None:
        picked = jax.nn.one_hot(row.chosen, vocab, dtype=logits.dtype)[:, None, :]
        return jnp.broadcast_to(picked, (len(row.chosen), len(logits), vocab))
    if row.both is None:
        score = jax.nn.one_hot(row.targets, vocab, dtype=logits.dtype) - jax.nn.softmax(logits)
        return (row.weights[:, None].astype(logits.dtype) * score)[None]
    _, gradients = statistics_of(logits, row.targets, row.temperatures.astype(logits.dtype))
    return jnp.einsum("kst,tsv->ksv", row.both.astype(logits.dtype), gradients)


def statistics_of(
    logits: jax.Array, targets: jax.Array, temperature: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    """log π(target) and H [2, S] of π = softmax(f / temperature), and their gradients by f.

    The gradients [2, S, V] are (e_y − π) / temperature and −π ⊙ (log π + H) / temperature.
    """
    log_probs = jax.nn.log_softmax(logits / temperature)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(probs * log_probs, axis=1, keepdims=True)
    target = jax.nn.one_hot(targets, logits.shape[1], dtype=logits.dtype)
    logp = jnp.take_along_axis(log_probs, targets[:, None], axis=1)
    gradients = jnp.stack([target - probs, -probs * (log_probs + entropy)]) / temperature
    return jnp.stack([logp[:, 0], entropy[:, 0]]), gradients


def site_rows(model: Model, sites: Sites, name: str) -> Rows:
    """One row a site, with the cotangent of log π(target).

    Raises:
      JaxdynError: if a site lies outside its sequence or on padding, a token id outside the
        vocabulary, or a sequence is longer than the model's context.
    """
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    rows, positions = np.asarray(sites.rows), np.asarray(sites.positions)
    targets = np.asarray(sites.targets)
    _check_tokens(model, tokens, mask, name)
    if not len(rows):
        raise JaxdynError(f"{name} must hold at least one site, got none")
    _check_range(rows, tokens.shape[0], f"{name}.rows", "a sequence's index")
    _check_range(positions, tokens.shape[1], f"{name}.positions", "a slot of the sequence")
    _check_range(targets, model.config.vocab_size, f"{name}.targets", "in the vocabulary")
    on_token = mask[rows, positions]
    if not on_token.all():
        n = int(np.argmin(on_token))
        raise JaxdynError(
            f"site {n} of {name} (sequence {rows[n]}, slot {positions[n]}) lies on padding; "
            "it must be on a token"
        )
    return Rows(
        tokens=tokens[rows],
        mask=mask[rows],
        positions=positions[:, None],
        targets=targets[:, None],
        weights=np.ones((len(rows), 1), np.float32),
    )


def with_cotangents(rows: Rows, cotangents: Any, vocab: int, name: str) -> Rows:
    """The rows with given logit cotangents g [N, V], one a site."""
    expected = (len(rows.tokens), vocab)
    if np.shape(cotangents) != expected:
        raise JaxdynError(f"{name} must be [N, V] = {expected}, got {np.shape(cotangents)}")
    return rows._replace(given=np.asarray(cotangents)[:, None, :])


def with_chosen(rows: Rows, token_ids: Any, vocab: int) -> Rows:
    """The rows with the C logits of `token_ids` as their functions."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise JaxdynError(f"token_ids must be a list of token ids, got {token_ids}")
    _check_range(ids, vocab, "token_ids", "in the vocabulary")
    return rows._replace(chosen=np.tile(ids.astype(np.int32), (len(rows.tokens), 1)))


def sequence_rows(model: Model, rollout: Rollout, weights: Any, name: str) -> Rows:
    """One row a sequence: Σ_c weights[b, c] mask[b, c] log π(completion token c of b).

    Raises:
      JaxdynError: as `site_rows`, and if the weights are not [B, C] or a prompt's last slot, where
        the first completion token is predicted, holds no token.
    """
    prompt_mask = np.asarray(rollout.prompt_mask)
    completion_mask = np.asarray(rollout.completion_mask)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    targets = np.asarray(rollout.completion_ids)
    _check_tokens(model, tokens, mask, name)
    shape = targets.shape
    if not shape[0] or not shape[1]:
        raise JaxdynError(f"{name} must hold at least one completion slot, got [B, C] = {shape}")
    ends = prompt_mask[:, -1:].any(axis=1)
    if not ends.all():
        b = int(np.argmin(ends))
        raise JaxdynError(f"prompt {b} of {name} must end in its last slot, which holds no token")
    weights = np.ones(shape, np.float32) if weights is None else weights
    if np.shape(weights) != shape:
        raise JaxdynError(f"weights of {name} must be [B, C] = {shape}, got {np.shape(weights)}")
    first = prompt_mask.shape[1] - 1
    return Rows(
        tokens=tokens,
        mask=mask,
        positions=np.tile(np.arange(first, first + shape[1]), (shape[0], 1)),
        targets=targets,
        weights=np.where(completion_mask, np.asarray(weights), 0),
    )


def with_both(rows: Rows, weights: Any, temperature: float) -> Rows:
    """The rows with K functions Σ_s w[n, k, s, 0] log π(target) + w[n, k, s, 1] H.

    The weights are [N, K, S, 2]; π is that at a temperature, of which 0 is read as 1.
    """
    temperatures = np.full(len(rows.tokens), temperature or 1.0)
    return rows._replace(both=np.asarray(weights), temperatures=temperatures)


def token_rows(rows: Rows, places: Any, name: str) -> Rows:
    """A row for each of M slots (row, s) of the rows' S, [M, 2], that counts alone."""
    at = np.asarray(places)
    if at.ndim != 2 or at.shape[1:] != (2,) or not at.size or at.dtype.kind not in "iu":
        raise JaxdynError(f"{name} must be [M, 2] of integers, got {np.shape(places)}")
    row, slot = at.T
    _check_range(row, len(rows.tokens), f"{name}[:, 0]", "a sequence's index")
    _check_range(slot, rows.positions.shape[1], f"{name}[:, 1]", "a completion slot")
    pick = lambda x: None if x is None else x[row, slot][:, None]
    return Rows(
        tokens=rows.tokens[row],
        mask=rows.mask[row],
        positions=pick(rows.positions),
        targets=pick(rows.targets),
        weights=pick(rows.weights),
        both=None if rows.both is None else rows.both[row, :, slot][:, :, None],
        temperatures=None if rows.temperatures is None else rows.temperatures[row],
    )


def _check_tokens(model, tokens, mask, name):
    """Padding's ids count too: one outside the vocabulary makes its sequence's features NaN."""
    _check_range(tokens, model.config.vocab_size, f"{name}.tokens", "in the vocabulary")
    longest = int(mask.sum(axis=1).max(initial=0))
    if longest > model.config.max_positions:
        raise JaxdynError(
            f"a sequence of {name} has {longest} tokens; the model's context is "
            f"{model.config.max_positions}"
        )


def _check_range(values, stop, name, wanted):
    bad = np.argwhere((values < 0) | (values >= stop))
    if len(bad):
        at = ", ".join(str(int(i)) for i in bad[0])
        raise JaxdynError(
            f"{name}[{at}] is {values[tuple(bad[0])]}; it must be {wanted}, from 0 to {stop - 1}"
        )
