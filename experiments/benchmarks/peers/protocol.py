"""What every runner shares: the problem's shape, and one line in, one line out.

A runner is a process that does one piece of work a line on stdin and answers with one line of
JSON on stdout: seconds by part. Whatever its libraries print goes to stderr. Nothing but the
standard library is imported here, for each runner has an environment of its own.

    python SOME_worker.py '{"layers": 4, ...}' step|generate
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

PAD, BEGIN, END, WORDS = 0, 1, 2, 3  # token ids; the words w3, w4, ... are the rest


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's and a rollout's sizes; `prompts` × `generations` sequences."""

    layers: int = 4
    width: int = 256
    mlp: int = 1024
    heads: int = 8
    vocab: int = 2048
    prompts: int = 2
    generations: int = 8
    prompt_length: int = 16
    completion_length: int = 64
    dtype: str = "float32"
    model: str = ""
    """A directory in the Hugging Face layout, whose weights are trained; the sizes are then its."""

    @property
    def rows(self) -> int:
        return self.prompts * self.generations

    @property
    def slots(self) -> int:
        return self.prompt_length + self.completion_length


SHAPES = {
    "small": Shape(),
    "toy": Shape(1, 16, 32, 2, 32, 2, 2, 4, 6),  # to see in seconds that everything runs
    "prompt-256": Shape(prompt_length=256),
    "prompt-512": Shape(prompts=1, prompt_length=512, completion_length=128),
    # With --model DIRECTORY, of which jaxdyn and TRL both train a copy.
    "smollm2-135m": Shape(30, 576, 1536, 9, 49152, 4, 8, 192, 64),
    "pythia-410m": Shape(24, 1024, 4096, 16, 50304, 8, 8, 128, 384, "bfloat16"),
    "pythia-2.8b": Shape(32, 2560, 10240, 32, 50304, 8, 8, 128, 384, "bfloat16"),
}


def add_shape_arguments(parser: argparse.ArgumentParser, **shape) -> None:
    """`--shape NAME` (with other options of its own), and a flag for each size that differs."""
    parser.add_argument("--shape", **{"default": "small", "choices": SHAPES, **shape})
    for field in dataclasses.fields(Shape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=field.type, help="instead of the named shape's")


def shape_from(chosen: argparse.Namespace) -> Shape:
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    return dataclasses.replace(SHAPES[chosen.shape], **given)


def name_of(shape: Shape) -> str:
    """What a result file of the shape is called after its suite: nothing for the default."""
    names = {known: f"_{name}".replace("-", "_") for name, known in SHAPES.items()}
    sizes = dataclasses.replace(shape, model="")  # where a model lies says nothing
    return "" if sizes == Shape() else names.get(sizes, "_custom")


def random_prompts(shape: Shape, count: int, seed: int = 0) -> list[str]:
    """Prompts of random words, each one token: "w17 w93 ..."."""
    draw = random.Random(seed)
    word = lambda: f"w{draw.randrange(WORDS, shape.vocab)}"
    return [" ".join(word() for _ in range(shape.prompt_length)) for _ in range(count)]


def even_words(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The share of a completion's words that are even: the reward of every framework here."""
    share = lambda words: sum(int(w[1:]) % 2 == 0 for w in words) / max(len(words), 1)
    return [share(text.split()) for text in completions]


class Runner:
    """A runner's side of the conversation. Construct it before importing anything that prints."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.shape = Shape(**json.loads(sys.argv[1]))
        self.task = sys.argv[2]
        self._started = 0.0
        self.parts: dict[str, float] = {}

    def ready(self, **about) -> None:
        """Say that everything is built (and nothing compiled yet), with versions and sizes."""
        self._say(about)

    def wait(self) -> bool:
        """Block until the next piece of work is asked for; False when there is none."""
        asked = sys.stdin.readline()
        self.parts, self._started = {}, time.perf_counter()
        return bool(asked)

    def answer(self) -> None:
        """The seconds since it was asked for, as "step" or "generate", and those of its parts."""
        self._say({self.task: time.perf_counter() - self._started, **self.parts})

    def turns(self) -> Iterator[int]:
        """0, 1, 2, ...: one each time work is asked for, answered when the next is taken."""
        turn = 0
        while self.wait():
            yield turn
            self.answer()
            turn += 1

    def timed(self, part: str, function: Callable, finish: Callable = lambda result: None):
        """The function, with its seconds added to a part; `finish` waits for its result."""

        def with_clock(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            finish(result)
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start
            return result

        return with_clock

    def _say(self, content: dict) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()
