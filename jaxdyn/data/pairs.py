"""Preferences as a reward model reads them: of each pair, two conversations as texts."""

import numpy as np

from jaxdyn.data.conversations import conversation, conversation_lengths
from jaxdyn.data.examples import PAIR
from jaxdyn.data.fit import Fitted, counted, refuse
from jaxdyn.data.prompts import Prompts
from jaxdyn.data.source import Example
from jaxdyn.types import JaxdynError


class Pairs(Prompts):
    """A source's preferences, or those at `places`: `prompt`, and `chosen` and `rejected`, each the
    whole conversation as one text."""

    def _written(self, example: Example) -> Example:
        prompt = example["prompt"]
        if missing := [name for name in PAIR if not isinstance(example.get(name), str)]:
            raise JaxdynError(
                f"{prompt!r:.60} has no {missing[0]!r}: a reward model learns from pairs"
            )
        texts = [conversation(prompt, example[n], self.config, self.tokenizer) for n in PAIR]
        if texts[0] == texts[1]:
            raise JaxdynError(f"{prompt!r:.60}: 'chosen' and 'rejected' are written alike")
        return {"prompt": prompt, **dict(zip(PAIR, texts, strict=True))}


def fit_pairs(pairs: Pairs, max_length: int) -> Fitted:
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
    return Fitted(pairs.at(np.flatnonzero(~lost)) if lost.any() else pairs, int(over.sum()))
