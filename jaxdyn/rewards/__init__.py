"""What a completion is worth: functions of texts, weighted and added up."""

from jaxdyn.rewards.compose import BUILT_IN, Reward, RewardConfig, RewardOutput, make_reward
from jaxdyn.rewards.verifiable import (
    Anagram,
    ContainsWords,
    ExactMatch,
    Finished,
    Length,
    NumericMatch,
    RegexMatch,
    RewardFunction,
    last_number,
)

__all__ = [
    "BUILT_IN",
    "Anagram",
    "ContainsWords",
    "ExactMatch",
    "Finished",
    "Length",
    "NumericMatch",
    "RegexMatch",
    "Reward",
    "RewardConfig",
    "RewardFunction",
    "RewardOutput",
    "last_number",
    "make_reward",
]
