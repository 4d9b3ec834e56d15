"""Which examples a step sees, and their texts as padded arrays.

A batch is a pure function of (seed, step): a run that starts again at step k sees what it would
have seen. Lengths come in a few buckets, so that a jitted step compiles a few times only.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdyn.data.stopping import position
from jaxdyn.data.tokenizer import Tokenizer
from jaxdyn.types import JaxdynError, PromptBatch

SMALLEST_BUCKET = 8


def batch_indices(
    seed: int, step: int, batch_size: int, num_examples: int, stream: int = 0
) -> Int[np.ndarray, " P"]:
    """The examples of one step's batch.

    The stream of examples is one permutation of all of them after another, epoch e's drawn from
    (seed, e); step k takes places k * batch_size onwards, so a batch may straddle two epochs.
    Another `stream` has other permutations.

    Raises JaxdynError without examples, or for a batch size below 1.
    """
    if num_examples < 1 or batch_size < 1:
        raise JaxdynError(f"cannot draw a batch of {batch_size} from {num_examples} examples")
    places = step * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(places, num_examples)
    batch = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        batch[inside] = _permutation(seed, int(epoch), num_examples, stream)[offsets[inside]]
    return batch


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_examples: int, stream: int) -> np.ndarray:
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    return np.random.default_rng(entropy).permutation(num_examples)


def epoch_of(step: int, batch_size: int, num_examples: int) -> float:
    """How many epochs have been seen before `step`."""
    return step * batch_size / num_examples


def bucket(length: int, limit: int) -> int:
    """The smallest power of two from 8 that holds `length` slots, or `limit` if that is less."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], max_prompt_length: int, truncate: bool = False
) -> PromptBatch:
    """Prompts as token ids [P, S], padded on the left to the bucket of the longest.

    `truncate` cuts what is longer than `max_prompt_length` at its beginning (`cut_left`).

    Raises JaxdynError for a prompt without a token or with more than `max_prompt_length`.
    """
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if truncate:
        rows = [cut_left(tokenizer, row, max_prompt_length) for row in rows]
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        _check(row, prompt, index, max_prompt_length, "max_prompt_length")
    ids, mask = _pad(rows, tokenizer.pad_id, max_prompt_length, left=True)
    return PromptBatch(prompt_ids=jnp.asarray(ids), prompt_mask=jnp.asarray(mask))


def cut_left(tokenizer: Tokenizer, ids: list[int], limit: int) -> list[int]:
    """The last `limit` tokens, the first of them the beginning-of-sequence token if it was so."""
    if len(ids) <= limit:
        return ids
    begins = ids[:1] if ids[0] == tokenizer.bos_id and limit > 1 else []
    return begins + ids[len(ids) - limit + len(begins) :]


def encode_supervised(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_length: int,
    max_prompt_length: int | None = None,
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Prompt, completion and stop token as (tokens, mask, completion_mask), padded on the right.

    `completion_mask` marks the tokens to be predicted: the completion's and the stop token. Where
    the tokens of prompt + completion begin with the prompt's, the rest are the completion's;
    where they merge across the seam, the two are tokenised apart. A prompt of more than
    `max_prompt_length` tokens, if that is given, is cut (`cut_left`).

    Raises JaxdynError for a prompt without a token, or a row with more than `max_length`.
    """
    rows, starts = [], []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        head = tokenizer.encode(prompt)
        row = tokenizer.encode(prompt + completion)
        if row[: len(head)] != head:
            row = head + tokenizer.encode(completion, special_tokens=False)
        if max_prompt_length is not None:
            kept = cut_left(tokenizer, head, max_prompt_length)
            head, row = kept, kept + row[len(head) :]
        row = [*row, tokenizer.stop_ids[0]]
        _check(head, prompt, index, max_length, "max_length")
        _check(row, prompt, index, max_length, "max_length", what="prompt and completion")
        rows.append(row)
        starts.append(len(head))
    tokens, mask = _pad(rows, tokenizer.pad_id, max_length, left=False)
    predicted = mask & (np.arange(tokens.shape[1])[None] >= np.array(starts)[:, None])
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(predicted)


def decode_completions(
    tokenizer: Tokenizer,
    completion_ids: Int[Array, "B C"] | Int[np.ndarray, "B C"],
    completion_mask: Bool[Array, "B C"] | Bool[np.ndarray, "B C"],
    stop: Sequence[str] = (),
) -> tuple[list[str], list[bool], list[list[int]]]:
    """Sampled completions as (texts without the stop token or string, finished, token ids).

    `finished` says whether a completion ended by a stop token or one of the strings `stop`
    (`stop_at_strings`) rather than at the last slot.
    """
    pairs = zip(np.asarray(completion_ids), np.asarray(completion_mask), strict=True)
    ids = [row[mask].tolist() for row, mask in pairs]
    texts = [tokenizer.decode_completion(row) for row in ids]
    ends = [position(text, stop) for text in texts]
    finished = [
        end is not None or (bool(row) and row[-1] in tokenizer.stop_ids)
        for row, end in zip(ids, ends, strict=True)
    ]
    return [text[:end] for text, end in zip(texts, ends, strict=True)], finished, ids


def _check(
    ids: list[int], prompt: str, index: int, limit: int, name: str, what: str = "the prompt"
) -> None:
    where = f"example {index} ({prompt[:40]!r})"
    if not ids:
        raise JaxdynError(f"{where}: the prompt is empty, it has no token")
    if len(ids) > limit:
        raise JaxdynError(f"{where}: {what} has {len(ids)} tokens, {name} is {limit}")


def _pad(
    rows: list[list[int]], pad_id: int, limit: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as an int32 array and its mask, [B, T], with T a bucket."""
    if not rows:
        raise JaxdynError("cannot encode a batch without prompts")
    slots = bucket(max(map(len, rows)), limit)
    ids = np.full((len(rows), slots), pad_id, np.int32)
    mask = np.zeros((len(rows), slots), bool)
    for i, row in enumerate(rows):
        where = slice(slots - len(row), slots) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, True
    return ids, mask
