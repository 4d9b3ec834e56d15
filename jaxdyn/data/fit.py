"""Which prompts are short enough for a run: all are read before it starts, and counted.

Lengths are kept in the cache beside the data sets: the next run with the same data, tokenizer and
template reads no prompt.
"""

import contextlib
import hashlib
import os
import tempfile
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdyn.data.prompts import Prompts
from jaxdyn.data.source import cache_root
from jaxdyn.types import JaxdynError

CHUNK = 1024
"""Prompts that are tokenized at a time."""


class Fitted(NamedTuple):
    """The prompts to use, and how many were too long: dropped, or to be cut."""

    prompts: Prompts
    overlong: int


def fit_prompts(prompts: Prompts, max_prompt_length: int) -> Fitted:
    """The prompts of which none stops a run in its middle.

    Those with more than `max_prompt_length` tokens are refused, left out, or kept for
    `encode_prompts` to cut, as `data.overlong` says.

    Raises:
      JaxdynError: for a prompt without a token; for one that is too long, or if no other is left.
    """
    lengths, how = prompt_lengths(prompts), prompts.config.overlong
    start = lambda place: repr(prompts[place]["prompt"][:40])
    if (lengths == 0).any():
        place = int(np.argmin(lengths))
        raise JaxdynError(f"example {place} ({start(place)}): the prompt is empty, it has no token")
    over = lengths > max_prompt_length
    count = int(over.sum())
    if count and how == "error":
        place = int(np.argmax(over))
        others = f" (and {count - 1} others are too long)" if count > 1 else ""
        raise JaxdynError(
            f"example {place} ({start(place)}): the prompt has {lengths[place]} tokens, "
            f"max_prompt_length is {max_prompt_length}{others}; data.overlong may be drop or "
            "truncate-left"
        )
    if how == "drop" and count == len(prompts):
        raise JaxdynError(
            f"data.overlong drop leaves no prompt: the shortest has {lengths.min()} tokens, "
            f"max_prompt_length is {max_prompt_length}"
        )
    kept = prompts.at(np.flatnonzero(~over)) if how == "drop" and count else prompts
    return Fitted(kept, count)


def prompt_lengths(prompts: Prompts) -> Int[np.ndarray, " N"]:
    """How many tokens each prompt has, from the cache if they were counted before."""
    path = cache_root(prompts.config) / "lengths" / f"{_key(prompts)}.npy"
    with contextlib.suppress(OSError, ValueError):
        kept = np.load(path, allow_pickle=False)
        if kept.shape == (len(prompts),):
            return kept
    lengths = np.empty(len(prompts), np.int64)
    for start in range(0, len(prompts), CHUNK):
        texts = [example["prompt"] for example in prompts[start : start + CHUNK]]
        lengths[start : start + len(texts)] = prompts.tokenizer.lengths(texts)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, lengths, allow_pickle=False)
        os.replace(file.name, path)
    return lengths


def _key(prompts: Prompts) -> str:
    """A hash of all that the lengths depend on."""
    config, tokenizer = prompts.config, prompts.tokenizer
    told = config.prompt_template, config.chat_template_kwargs, config.template_date
    about = (prompts.source.key, told, tokenizer.special_tokens, tokenizer.chat_template)
    found = hashlib.sha256(repr((about, tokenizer.bos_id)).encode())
    found.update(prompts.places.tobytes())
    found.update(tokenizer.backend.to_str().encode())
    return found.hexdigest()[:32]
