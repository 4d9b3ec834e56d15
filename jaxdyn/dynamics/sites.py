"""Sites: from prompts, from texts, from a rollout; and what is said at each.

The arrays are those that `jaxdyn.data.encode_prompts` and `encode_supervised` give.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdyn.types import PromptBatch, Rollout, Sites

CONTEXT = 16
"""How many tokens before a site are kept as its text."""


def sites_from_prompts(prompts: PromptBatch) -> Sites:
    """Each prompt's last token, where its completion would begin; the targets are 0."""
    count, slots = prompts.prompt_ids.shape
    nothing = jnp.zeros(count, jnp.int32)
    return Sites(
        tokens=prompts.prompt_ids,
        mask=prompts.prompt_mask,
        rows=jnp.arange(count, dtype=jnp.int32),
        positions=jnp.full_like(nothing, slots - 1),
        targets=nothing,
        is_prompt=jnp.ones(count, bool),
    )


def sites_from_texts(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    predicted: Bool[Array, "B T"],
    sites_per_completion: int,
    seed: int,
) -> Sites:
    """Each prompt's last token, and random places inside its completion.

    The prompt site predicts the completion's first token; a completion site, drawn without
    replacement, predicts one of the later ones. Completions of a single token (or of fewer than
    asked for) have fewer sites.

    Args:
      tokens, mask: B prompts with their completions, padded anywhere but in between.
      predicted: which of the tokens are the completions'; each has a token before it.
      sites_per_completion: how many places inside each.
      seed: of their choice.
    """
    ids, completed = np.asarray(tokens), np.asarray(predicted)
    rng = np.random.default_rng(seed)
    places, first = [], []
    for row, slots in enumerate(completed):
        if not slots.any():
            continue
        start, *inside = np.flatnonzero(slots)
        drawn = rng.permutation(inside)[:sites_per_completion]
        places += [(row, int(slot)) for slot in (start, *sorted(drawn))]
        first += [True] + [False] * len(drawn)
    rows, slots = np.array(places).T
    return Sites(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        rows=jnp.asarray(rows, jnp.int32),
        positions=jnp.asarray(slots - 1, jnp.int32),
        targets=jnp.asarray(ids[rows, slots], jnp.int32),
        is_prompt=jnp.asarray(first),
    )


def sites_from_rollout(rollout: Rollout, sites_per_completion: int, seed: int) -> Sites:
    """`sites_from_texts` of sampled completions."""
    prompts = np.zeros(rollout.prompt_ids.shape, bool)
    predicted = np.concatenate([prompts, np.asarray(rollout.completion_mask)], axis=1)
    given = rollout.tokens, rollout.mask, jnp.asarray(predicted)
    return sites_from_texts(*given, sites_per_completion, seed)


def rollout_from_texts(
    prompts: PromptBatch,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    predicted: Bool[Array, "B T"],
    max_completion_length: int,
) -> Rollout:
    """Given completions as if they had been sampled, cut after so many tokens; log-probs are 0.

    Args:
      prompts: the B prompts alone.
      tokens, mask, predicted: the prompts with their completions, padded on the right, and which
        tokens are the completions'.
    """
    ids, present, completed = (np.asarray(x) for x in (tokens, mask, predicted))
    count = min(max_completion_length, int(completed.sum(axis=1).max()))
    at = (present & ~completed).sum(axis=1, keepdims=True) + np.arange(count)[None]
    inside = np.minimum(at, ids.shape[1] - 1)
    cut = lambda x: np.take_along_axis(x, inside, axis=1)
    return Rollout(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        completion_ids=jnp.asarray(cut(ids)),
        completion_mask=jnp.asarray(cut(completed) & (at == inside)),
        per_token_logps=jnp.zeros(at.shape, jnp.float32),
    )


def site_texts(tokenizer: Any, sites: Sites) -> tuple[list[str], list[str]]:
    """The end of the text before each site, and the token predicted there.

    `tokenizer` is a `jaxdyn.data.Tokenizer`.
    """
    contexts, targets = [], []
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    numbers = (np.asarray(x).tolist() for x in (sites.rows, sites.positions, sites.targets))
    for row, position, target in zip(*numbers, strict=True):
        before = tokens[row, : position + 1][mask[row, : position + 1]]
        contexts.append(tokenizer.decode_completion(before[-CONTEXT:].tolist()))
        text = tokenizer.decode_completion([target])
        targets.append(text or tokenizer.backend.id_to_token(target) or f"<{target}>")
    return contexts, targets
