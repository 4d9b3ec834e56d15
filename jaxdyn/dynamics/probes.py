"""The fixed set of sites at which a run is watched."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxdyn.ranges import at_least
from jaxdyn.types import Rollout, Sites


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Where and how often the dynamics are measured.

    A measurement costs about four passes over the probe's sequences: sites that share a sequence
    are cheap, further prompts are not.

    Attributes:
      every: measure the update of every `every`-th step (0: never).
      num_prompts: probe prompts; the last token of each is one site.
      sites_per_completion: sites inside each prompt's completion, sampled once by the policy
        before training.
    """

    every: int = 10
    num_prompts: int = 16
    sites_per_completion: int = 3

    def __post_init__(self):
        at_least(0, self, "probe", "every", "sites_per_completion")
        at_least(2, self, "probe", "num_prompts")


def sites_from_rollout(rollout: Rollout, sites_per_completion: int, seed: int) -> Sites:
    """Each prompt's last token, and random places inside its completion.

    The prompt site predicts the completion's first token; a completion site, drawn without
    replacement, predicts one of the later ones. Completions of a single token (or of fewer than
    asked for) have fewer sites.
    """
    mask = np.asarray(rollout.completion_mask)
    completions = np.asarray(rollout.completion_ids)
    prompt_slots = rollout.prompt_ids.shape[1]
    rng = np.random.default_rng(seed)
    sites = []
    for row, length in enumerate(mask.sum(axis=1)):
        inside = np.arange(1, length)
        drawn = rng.permutation(inside)[:sites_per_completion]
        sites += [(row, place) for place in (0, *sorted(drawn))]
    rows, places = np.array(sites).T
    return Sites(
        tokens=jnp.asarray(rollout.tokens),
        mask=jnp.asarray(rollout.mask),
        rows=jnp.asarray(rows, jnp.int32),
        positions=jnp.asarray(places + prompt_slots - 1, jnp.int32),
        targets=jnp.asarray(completions[rows, places], jnp.int32),
        is_prompt=jnp.asarray(places == 0),
    )
