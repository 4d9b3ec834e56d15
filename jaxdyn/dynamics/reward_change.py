r"""A change of the expected reward as a sum over tokens.

From a policy a to a policy b, with ρ = π_b(y) / π_a(y) of a whole completion y and any baseline c
that does not depend on y,

    J(b) − J(a) = E_a[(ρ − 1)(R − c)] = E_a[w Σ_t Δ log π(y_t)],   w = (R − c) (ρ − 1) / log ρ,

exactly, since log ρ is the sum over the completion's tokens of Δ log π. So whatever splits Δ log π
of the tokens (a ledger's components, layers, the tokens themselves) splits the reward's change; to
first order w is R − c, and this is the policy gradient. Of importance weights it has the variance:
between checkpoints that are far apart, go by way of those in between.

(ρ − 1) / log ρ is the logarithmic mean of ρ and 1, by which index numbers are taken apart (Ang
2004, Energy Policy 32, 1131); its use for a policy's tokens is ours.
"""

import numpy as np
from jaxtyping import Float

from jaxdyn.types import JaxdynError


def reward_weights(
    rewards: Float[np.ndarray, "P G"], log_ratios: Float[np.ndarray, "P G"]
) -> Float[np.ndarray, "P G"]:
    """w / (P G) of G completions of each of P prompts, sampled from a: Σ w Δ log π over all their
    tokens estimates J(b) − J(a), without bias.

    Args:
      rewards: R; the baseline is the mean of the prompt's other completions.
      log_ratios: log ρ, in nats, at temperature 1 as they were sampled.

    Raises:
      JaxdynError: for fewer than two completions a prompt, or two shapes.
    """
    rewards, log_ratios = np.asarray(rewards, np.float64), np.asarray(log_ratios, np.float64)
    if rewards.shape != log_ratios.shape or rewards.shape[1] < 2:
        raise JaxdynError(
            "rewards and log_ratios must be [P, G] with G at least 2, got "
            f"{rewards.shape} and {log_ratios.shape}"
        )
    others = rewards.shape[1] / (rewards.shape[1] - 1)
    centred = (rewards - rewards.mean(axis=1, keepdims=True)) * others
    still = log_ratios == 0
    mean = np.where(still, 1.0, np.expm1(log_ratios) / np.where(still, 1.0, log_ratios))
    return centred * mean / rewards.size
