"""What a completion is worth: functions of texts, weighted and added up."""

from jaxdyn.rewards.compose import BUILT_IN, Reward, RewardConfig, RewardOutput, make_reward
from jaxdyn.rewards.verifiable import (
    RewardFunction,
    anagram,
    contains_words,
    exact_match,
    finished,
    last_number,
    length,
    numeric_match,
    regex_match,
)

__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardConfig",
    "RewardFunction",
    "RewardOutput",
    "anagram",
    "contains_words",
    "exact_match",
    "finished",
    "last_number",
    "length",
    "make_reward",
    "numeric_match",
    "regex_match",
]
