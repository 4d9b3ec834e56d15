"""The procedural task: write an expression that equals a number, one of many right answers.

    prompt `17=`        completion `9+8`, or `20-3`, or ...

Every target N in [lowest, highest] has the same number of right answers over operands in
[0, highest]: N + 1 sums and highest - N + 1 differences, highest + 2 in all. So the reward is
verifiable and the diversity of a policy's right answers is a quantity of its own.
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
    """Largest target, and largest operand."""
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
        if self.per_target < 1:
            raise JaxdynError(f"equations: per_target must be at least 1, got {self.per_target}")
        if not 0 <= self.noise <= 1:
            raise JaxdynError(f"equations: noise must lie in [0, 1], got {self.noise}")
        if not 0 < self.held_out < 1:
            raise JaxdynError(f"equations: held_out must lie in (0, 1), got {self.held_out}")
        if self.seed < 0:
            raise JaxdynError(f"equations: seed must not be negative, got {self.seed}")


def expression(rng: np.random.Generator, target: int, highest: int) -> str:
    """A uniformly drawn operator, then a uniformly drawn pair of operands that gives `target`."""
    if rng.random() < 0.5:
        first = int(rng.integers(0, target + 1))
        return f"{first}+{target - first}"
    second = int(rng.integers(0, highest - target + 1))
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
                "completion": expression(rng, shown, config.highest),
                "answer": str(target),
            }
