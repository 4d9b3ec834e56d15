"""Stop strings: a completion ends with the token that completes one of them.

The text decides, not the tokens: a string may be tokenized in many ways. So it is looked for once
all is sampled. What was sampled after it is masked, which leaves the log-probs before it as they
are.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdyn.data.tokenizer import Tokenizer
from jaxdyn.types import Rollout


def stop_at_strings(tokenizer: Tokenizer, rollout: Rollout, strings: Sequence[str]) -> Rollout:
    """The rollout with each completion cut after the token with which its text first has a string.

    `rollout`'s own arrays but its features are whole. Without strings it is left alone.
    """
    if not strings:
        return rollout
    mask = np.asarray(rollout.completion_mask)
    rows = zip(np.asarray(rollout.completion_ids), mask, strict=True)
    lengths = np.array([length_until(tokenizer, ids[m].tolist(), strings) for ids, m in rows])
    kept = np.arange(mask.shape[1]) < lengths[:, None]
    features = rollout.features
    return dataclasses.replace(
        rollout,
        completion_ids=jnp.where(kept, rollout.completion_ids, tokenizer.pad_id),
        completion_mask=jnp.asarray(kept),
        per_token_logps=jnp.where(kept, rollout.per_token_logps, 0),
        features=None if features is None else jnp.where(kept[..., None], features, 0),
    )


def length_until(tokenizer: Tokenizer, ids: list[int], strings: Sequence[str]) -> int:
    """How many tokens it takes until the text has one of the strings; all if it never has.

    By bisection: what a text has, it still has when it is longer.
    """
    has = lambda count: position(tokenizer.decode_completion(ids[:count]), strings) is not None
    if not has(len(ids)):
        return len(ids)
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has(middle) else (middle, high)
    return high


def position(text: str, strings: Sequence[str]) -> int | None:
    """Where the first of the strings begins in a text."""
    found = [text.find(string) for string in strings if string in text]
    return min(found, default=None)
