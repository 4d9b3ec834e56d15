"""The procedural task: rearrange the letters of a prompt, with many right answers.

    prompt `gcdba=`        completion `bagcd`, or `dcgab`, or any other of the 5! orders

A prompt is `length` distinct letters in a random order; a completion is right if it has each of
them exactly once. So the reward is verifiable, and the diversity of a policy's right answers is a
quantity of its own: a policy can be always right with a single order or with all of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from jaxdyn.grammar import LARGEST_SEED, at_least, between
from jaxdyn.types import JaxdynError

MOST_SETS = 1_000_000
"""The sets of letters are listed one by one: no more than this many."""


@dataclasses.dataclass(frozen=True)
class AnagramsConfig:
    """The rearrangement task. The defaults have C(16, 5) = 4368 sets of letters.

    Attributes:
      letters: the letters to draw from, each once.
      length: letters in a prompt.
      train_examples: demonstrations in the train split, of sets of letters drawn with replacement.
      test_examples: sets of letters that only the test split has, each in one example.
      seed: of every draw.
    """

    letters: str = "abcdefghijklmnop"
    length: int = 5
    train_examples: int = 8000
    test_examples: int = 400
    seed: int = 0

    def __post_init__(self):
        if not self.letters.isalnum() or len(set(self.letters)) < len(self.letters):
            raise JaxdynError(
                f"data.anagrams.letters must be distinct letters or digits, got {self.letters!r}"
            )
        between(1, len(self.letters), self, "data.anagrams", "length")
        sets = math.comb(len(self.letters), self.length)
        if sets > MOST_SETS:
            raise JaxdynError(
                f"data.anagrams.length must make at most {MOST_SETS} sets of {len(self.letters)} "
                f"letters, got {self.length}, which makes {sets}"
            )
        at_least(1, self, "data.anagrams", "test_examples", most=MOST_SETS)
        if self.test_examples >= sets:
            raise JaxdynError(
                f"data.anagrams.test_examples must hold out at least 1 of the {sets} sets of "
                f"letters and leave one, got {self.test_examples}"
            )
        at_least(1, self, "data.anagrams", "train_examples", most=10**7)
        at_least(0, self, "data.anagrams", "seed", most=LARGEST_SEED)


def anagrams(config: AnagramsConfig, split: str) -> Iterator[dict[str, str]]:
    """The examples of `train` or `test`: `prompt`, `completion`, `letters`.

    No set of letters is in both splits. The prompt's order and the completion's are independent
    and uniform; `letters` is the prompt without its `=`.
    """
    sets = ["".join(chosen) for chosen in itertools.combinations(config.letters, config.length)]
    np.random.default_rng([config.seed, 0]).shuffle(sets)
    test = split == "test"
    rng = np.random.default_rng([config.seed, 2 if test else 1])
    held_out = config.test_examples
    drawn = range(held_out) if test else rng.integers(held_out, len(sets), config.train_examples)
    for index in drawn:
        prompt, completion = ("".join(rng.permutation(list(sets[index]))) for _ in range(2))
        yield {"prompt": f"{prompt}=", "completion": completion, "letters": prompt}
