"""Which prompts are short enough for a run: all are read before it starts, and counted.

Lengths are kept in the cache beside the data sets: the next run with the same data, tokenizer and
template reads no prompt.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from jaxdyn.data.prompts import Prompts
from jaxdyn.data.source import cache_root
from jaxdyn.data.templates import Rendered
from jaxdyn.types import JaxdynError

CHUNK, CHARACTERS = 1024, 2**21
"""Prompts that are read at a time, and about how much of them is tokenized at once."""

UNANSWERED = "supervised training needs a text under 'completion' in every example, and it has none"


class Fitted(NamedTuple):
    """The prompts to use, and how many were too long: dropped, or to be cut."""

    prompts: Prompts
    overlong: int


def fit_prompts(prompts: Prompts, max_prompt_length: int, max_length: int | None = None) -> Fitted:
    """The prompts of which none stops a run in its middle.

    Those with more than `max_prompt_length` tokens are refused, left out, or kept for
    `encode_prompts` to cut, as `data.overlong` says. Of a supervised run, a prompt that has more
    than `max_length` with its completion and a stop token is refused or left out, and one without
    a completion refused.

    Raises:
      JaxdynError: for a prompt without a token; for one that is too long, or if no other is left.
    """
    lengths, how = token_counts(prompts), prompts.config.overlong
    refuse(prompts, lengths == 0, lambda place: "the prompt is empty, it has no token")
    over = lengths > max_prompt_length
    said = "; data.overlong may be drop or truncate-left"
    if how == "error":
        limit = f"max_prompt_length is {max_prompt_length}{said}"
        refuse(prompts, over, lambda i: f"the prompt has {lengths[i]} tokens, {limit}")
    lost = over if how == "drop" else np.zeros_like(over)
    if max_length is not None:
        answers = token_counts(prompts, "completion")
        refuse(prompts, answers < 0, lambda place: UNANSWERED)
        rows = np.minimum(lengths, max_prompt_length) + answers + 1
        long = ~lost & (rows > max_length)
        if how == "error":
            limit = f"the context is {max_length}{said}"
            refuse(prompts, long, lambda i: f"prompt and completion have {rows[i]} tokens, {limit}")
        lost, over = lost | long, over | long
    if lost.all():
        raise JaxdynError(
            f"data.overlong {how} leaves no prompt: the shortest has {lengths.min()} tokens, "
            f"max_prompt_length is {max_prompt_length}"
        )
    kept = prompts.at(np.flatnonzero(~lost)) if lost.any() else prompts
    return Fitted(kept, int(over.sum()))


def refuse(prompts: Prompts, bad: np.ndarray, why: Callable[[int], str]) -> None:
    """Raise for the first of the bad prompts, and say how many there are."""
    if not bad.any():
        return
    place = int(np.argmax(bad))
    others = f" (and {bad.sum() - 1} others like it)" if bad.sum() > 1 else ""
    raise JaxdynError(f"example {place} ({prompts[place]['prompt'][:40]!r}): {why(place)}{others}")


def token_counts(
    prompts: Prompts, of: Literal["prompt", "completion"] = "prompt"
) -> Int[np.ndarray, " N"]:
    """How many tokens each prompt has, or its completion apart; from the cache if they are there.

    -1 where there is none. Together, where tokens merge across the seam, the two have hardly ever
    more.
    """

    def lengths(start: int, stop: int) -> np.ndarray:
        found = [example.get(of) for example in prompts[start:stop]]
        texts = [text if isinstance(text, str) else "" for text in found]
        if of == "completion":  # begins nothing
            texts = [Rendered(text) for text in texts]
        counts = [n for part in _portions(texts) for n in prompts.tokenizer.lengths(part)]
        return np.where([isinstance(text, str) for text in found], counts, -1)

    return counted(prompts, of, lengths)


def counted(
    prompts: Prompts, of: str, lengths: Callable[[int, int], ArrayLike]
) -> Int[np.ndarray, " N"]:
    """The lengths of all examples, a stretch at a time; from the cache if they are there."""
    path = cache_root(prompts.config) / "lengths" / f"{_key(prompts)}-{of}-counts.npy"
    with contextlib.suppress(Exception):  # NumPy raises many kinds; what is damaged is made again
        kept = np.load(path, allow_pickle=False)
        if kept.shape == (len(prompts),) and kept.dtype == np.int64 and kept.min() >= -1:
            return kept
    counts = np.empty(len(prompts), np.int64)
    for start in range(0, len(prompts), CHUNK):
        stop = min(start + CHUNK, len(prompts))
        counts[start:stop] = lengths(start, stop)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, counts, allow_pickle=False)
        os.replace(file.name, path)
    return counts


def _portions(texts: list[str]) -> Iterator[list[str]]:
    """The texts in their order, few enough at a time for what the tokenizer makes of them."""
    portion: list[str] = []
    held = 0
    for text in texts:
        if portion and held + len(text) > CHARACTERS:
            yield portion
            portion, held = [], 0
        portion.append(text)
        held += len(text)
    if portion:
        yield portion


def _key(prompts: Prompts) -> str:
    """A hash of all that the lengths depend on."""
    config, tokenizer = prompts.config, prompts.tokenizer
    told = config.prompt_template, config.chat_template_kwargs, config.template_date
    about = (prompts.source.key, told, tokenizer.special_tokens, tokenizer.chat_template)
    found = hashlib.sha256(repr((about, tokenizer.bos_id)).encode())
    found.update(prompts.places.tobytes())
    found.update(tokenizer.backend.to_str().encode())
    return found.hexdigest()[:32]
