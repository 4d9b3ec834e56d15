"""The procedural task: write an expression that equals a number, one of many right answers.

    prompt `17=`        completion `9+8`, or `20-3`, or ...

Demonstrations have a second operand of at most `largest_second`, k: min(N, k) + 1 sums and k + 1
differences, each as likely as the others of its operator. Any expression of that form that equals N
is right. So the reward is verifiable and the diversity of a policy's right answers is a quantity of
its own.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxdyn.types import JaxdynError

ALPHABET = "0123456789+-="


@dataclasses.dataclass(frozen=True)
class EquationsConfig:
    """The number-to-expression task."""

    lowest: int = 10
    """Smallest target."""
    highest: int = 99
    """Largest target."""
    largest_second: int = 9
    """Largest second operand of a demonstration."""
    per_target: int = 32
    """Supervised examples for each target of the train split."""
    noise: float = 0.0
    """Share of the train split's demonstrations that equal another target, in [0, 1]."""
    held_out: float = 0.2
    """Share of the targets that only the test split has, in (0, 1)."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.lowest < self.highest:
            raise JaxdynError(
                f"equations: wanted 0 <= lowest < highest, got {self.lowest} and {self.highest}"
            )
        if self.largest_second < 0:
            raise JaxdynError(
                f"equations: largest_second must not be negative, got {self.largest_second}"
            )
        if self.per_target < 1:
            raise JaxdynError(f"equations: per_target must be at least 1, got {self.per_target}")
        if not 0 <= self.noise <= 1:
            raise JaxdynError(f"equations: noise must lie in [0, 1], got {self.noise}")
        if not 0 < self.held_out < 1:
            raise JaxdynError(f"equations: held_out must lie in (0, 1), got {self.held_out}")
        if self.seed < 0:
            raise JaxdynError(f"equations: seed must not be negative, got {self.seed}")


def expression(rng: np.random.Generator, target: int, largest_second: int) -> str:
    """A uniformly drawn operator, then a uniformly drawn second operand, that give `target`."""
    if rng.random() < 0.5:
        second = int(rng.integers(0, min(target, largest_second) + 1))
        return f"{target - second}+{second}"
    second = int(rng.integers(0, largest_second + 1))
    return f"{target + second}-{second}"


def equations(config: EquationsConfig, split: str) -> Iterator[dict[str, str]]:
    """The examples of `train` or `test`: `prompt`, `completion`, `answer`; disjoint targets.

    The train split has `per_target` demonstrations of each of its targets, a share `noise` of
    them for another target's value; the test split has one right demonstration a target.
    """
    targets = np.arange(config.lowest, config.highest + 1)
    np.random.default_rng([config.seed, 0]).shuffle(targets)
    held_out = min(max(1, round(config.held_out * len(targets))), len(targets) - 1)
    test = split == "test"
    rng = np.random.default_rng([config.seed, 2 if test else 1])
    for target in np.sort(targets[:held_out] if test else targets[held_out:]).tolist():
        for _ in range(1 if test else config.per_target):
            shown = target
            if not test and rng.random() < config.noise:
                # One of the other targets, each as likely.
                shown = int(rng.integers(config.lowest, config.highest))
                shown += shown >= target
            yield {
                "prompt": f"{target}=",
                "completion": expression(rng, shown, config.largest_second),
                "answer": str(target),
            }
