"""Preferences as a reward model reads them: of each pair, two conversations as texts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdyn.data.conversations import conversation, conversation_lengths
from jaxdyn.data.examples import PAIR
from jaxdyn.data.fit import counted, refuse
from jaxdyn.data.source import DataConfig, Source
from jaxdyn.data.tokenizer import Tokenizer
from jaxdyn.types import JaxdynError


class Pairs(Sequence):
    """A source's preferences, or those at `places`: `prompt`, and `chosen` and `rejected`, each the
    whole conversation as one text."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        tokenizer: Tokenizer,
        places: np.ndarray | None = None,
    ):
        self.source, self.config, self.tokenizer = source, config, tokenizer
        self.places = np.arange(len(source)) if places is None else places

    @property
    def left_out(self) -> dict[str, int]:
        """As `Source.left_out`."""
        return self.source.left_out

    def at(self, places: np.ndarray) -> "Pairs":
        """Those of them at some places."""
        return Pairs(self.source, self.config, self.tokenizer, self.places[places])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self.places[index])
        example, where = self.source[place], f"data.name {self.config.name}, example {place}"
        prompt = example["prompt"]
        if missing := [name for name in PAIR if not isinstance(example.get(name), str)]:
            raise JaxdynError(
                f"{where} ({prompt!r:.60}) has no {missing[0]!r}: a reward model learns from pairs"
            )
        try:
            texts = [conversation(prompt, example[n], self.config, self.tokenizer) for n in PAIR]
        except JaxdynError as error:
            raise JaxdynError(f"{where}: {error}") from error
        if texts[0] == texts[1]:
            raise JaxdynError(
                f"{where} ({prompt!r:.60}): 'chosen' and 'rejected' are written alike"
            )
        return {"prompt": prompt, **dict(zip(PAIR, texts, strict=True))}


class FittedPairs(NamedTuple):
    """The pairs to use, and how many were too long: dropped, or to be cut."""

    prompts: Pairs
    overlong: int


def fit_pairs(pairs: Pairs, max_length: int) -> FittedPairs:
    """The pairs of which none stops a run in its middle.

    Those of which one conversation has more than `max_length` tokens are refused, left out, or kept
    to be cut at their beginning, as `data.overlong` says.

    Raises:
      JaxdynError: for a pair that is too long, or if no other is left; for a row without a pair.
    """

    def longest(start: int, stop: int) -> list[int]:
        found = pairs[start:stop]
        of = lambda name: conversation_lengths(pairs.tokenizer, [pair[name] for pair in found])
        return list(map(max, *map(of, PAIR)))

    lengths, how = counted(pairs, "pair", longest), pairs.config.overlong
    over = lengths > max_length
    if how == "error":
        told = f"train.max_length is {max_length}; data.overlong may be drop or truncate-left"
        refuse(pairs, over, lambda i: f"prompt and answer have {lengths[i]} tokens, {told}")
    lost = over & (how == "drop")
    if lost.all():
        raise JaxdynError(
            f"data.overlong drop leaves no pair: the shortest has {lengths.min()} tokens, "
            f"train.max_length is {max_length}"
        )
    return FittedPairs(pairs.at(np.flatnonzero(~lost)) if lost.any() else pairs, int(over.sum()))
