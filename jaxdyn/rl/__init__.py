"""Log-probabilities, advantages, KL estimators and losses: pure functions of arrays."""

from jaxdyn.rl.advantages import group_relative, leave_one_out, plain
from jaxdyn.rl.kl import penalised_rewards, per_token_kl
from jaxdyn.rl.logprobs import TokenStatistics, feature_statistics, token_statistics
from jaxdyn.rl.losses import LOSSES, LossConfig, Normalizer, normalizer_of, policy_loss

__all__ = [
    "LOSSES",
    "LossConfig",
    "Normalizer",
    "TokenStatistics",
    "feature_statistics",
    "group_relative",
    "leave_one_out",
    "normalizer_of",
    "penalised_rewards",
    "per_token_kl",
    "plain",
    "policy_loss",
    "token_statistics",
]
