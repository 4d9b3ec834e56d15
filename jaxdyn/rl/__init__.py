"""Log-probabilities, advantages, KL estimators and losses: pure functions of arrays."""

from jaxdyn.rl.advantages import (
    KINDS,
    AdvantageConfig,
    ScoredBatch,
    advantage_kind,
    check_combination,
    compares_generations,
    estimate_advantages,
    group_relative,
    leave_one_out,
    overlong_penalty,
    plain,
)
from jaxdyn.rl.aggregation import Normalizer, aggregate, drop_truncated, normalizer_of
from jaxdyn.rl.cotangents import LogitCotangents, logit_cotangents
from jaxdyn.rl.covariance import CovarianceConfig, covariances, held_back
from jaxdyn.rl.importance import ImportanceConfig
from jaxdyn.rl.kl import kl_penalty, penalised_rewards, per_token_kl
from jaxdyn.rl.logprobs import TokenStatistics, token_statistics
from jaxdyn.rl.losses import LOSSES, LossConfig, policy_loss
from jaxdyn.rl.support import support_log_mass
from jaxdyn.rl.values import (
    explained_variance,
    generalized_advantages,
    token_rewards,
    value_loss,
    whiten,
)
from jaxdyn.rl.vocabulary import feature_statistics, vocabulary_chunk
