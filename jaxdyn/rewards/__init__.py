"""What a completion is worth: functions of texts, weighted and added up."""

from jaxdyn.rewards.compose import (
    BUILT_IN,
    LEARNED,
    Reward,
    RewardConfig,
    RewardOutput,
    make_reward,
)
from jaxdyn.rewards.learned import LearnedReward
from jaxdyn.rewards.mathematics import MathVerify
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
