"""Cutting a rollout to what was sampled."""

import dataclasses

import jax

from jaxdyn.types import Rollout

SMALLEST_BUCKET = 8


def trim(rollout: Rollout) -> Rollout:
    """The rollout with C cut to the bucket of its longest completion: a power of two from 8.

    An update then computes on the slots that sampling filled rather than on the longest completion
    allowed, and compiles once a bucket. Waits for the rollout.
    """
    slots = rollout.completion_mask.shape[1]
    longest = int(rollout.completion_mask.any(axis=0).sum())
    kept = min(slots, max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length()))
    cut = lambda x: x[:, :kept]
    return dataclasses.replace(
        rollout,
        completion_ids=cut(rollout.completion_ids),
        completion_mask=cut(rollout.completion_mask),
        per_token_logps=cut(rollout.per_token_logps),
        features=jax.tree.map(cut, rollout.features),
        support=jax.tree.map(cut, rollout.support),
    )
