"""Prompts that open a children's story, and the words its continuation has to contain.

The words are those small models trained on TinyStories (Eldan and Li, arXiv 2305.07759) know.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from jaxdyn.grammar import LARGEST_SEED, at_least
from jaxdyn.types import JaxdynError

OPENINGS = (
    "Once upon a time, there was a little {child} named {name}. {She} had a {look} {thing}.",
    "One day, a {child} named {name} went to the {place}. {She} saw a {look} {thing}.",
    "Once upon a time, a {child} named {name} found a {look} {thing} in the {place}.",
    "{name} was a little {child}. One day, {name} lost {her} {look} {thing} at the {place}.",
    "One day, {name} and {her} mom went to the {place}. {She} wanted a {look} {thing}.",
)
NAMES = {
    "girl": ("Lily", "Sue", "Mia", "Amy", "Anna", "Lucy", "Jane", "Sara"),
    "boy": ("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Bob", "Leo"),
}
PRONOUNS = {"girl": ("She", "her"), "boy": ("He", "his")}
THINGS = (
    *("ball", "doll", "car", "hat", "book", "box", "toy", "cake"),
    *("flower", "bird", "dog", "cat", "fish", "boat", "bike"),
)
LOOKS = ("red", "blue", "big", "small", "pretty", "new")
PLACES = ("park", "garden", "beach", "forest", "store", "farm")
FEELINGS = ("happy", "sad", "scared", "proud", "excited", "glad")


@dataclasses.dataclass(frozen=True)
class StoriesConfig:
    """Story openings with the words to use.

    Attributes:
      train_prompts: how many openings the train split has.
      test_prompts: how many openings the test split has, all different from the train split's.
      seed: of every draw.
    """

    train_prompts: int = 2048
    test_prompts: int = 256
    seed: int = 0

    def __post_init__(self):
        at_least(1, self, "data.stories", "train_prompts", "test_prompts")
        at_least(0, self, "data.stories", "seed", most=LARGEST_SEED)


def openings() -> dict[str, str]:
    """Every opening, and the thing it names."""
    people = [(child, name) for child, names in NAMES.items() for name in names]
    things = {}
    for opening, (child, name), thing, look, place in itertools.product(
        OPENINGS, people, THINGS, LOOKS, PLACES
    ):
        she, her = PRONOUNS[child]
        text = opening.format(
            child=child, name=name, She=she, her=her, look=look, thing=thing, place=place
        )
        things[text] = thing
    return things


def stories(config: StoriesConfig, split: str) -> Iterator[dict[str, str | list[str]]]:
    """The examples of `train` or `test`: `prompt`, and `words` = [the thing, a feeling].

    Raises JaxdynError if there are fewer openings than prompts wanted.
    """
    things = openings()
    wanted = config.train_prompts + config.test_prompts
    if wanted > len(things):
        raise JaxdynError(
            f"data.stories.train_prompts and test_prompts must be at most {len(things)} together, "
            f"got {wanted}"
        )
    rng = np.random.default_rng(config.seed)
    prompts = rng.permutation(list(things))[:wanted].tolist()
    feelings = rng.choice(FEELINGS, wanted).tolist()
    start, stop = (config.train_prompts, wanted) if split == "test" else (0, config.train_prompts)
    for prompt, feeling in zip(prompts[start:stop], feelings[start:stop], strict=True):
        yield {"prompt": prompt, "words": [things[prompt], feeling]}
