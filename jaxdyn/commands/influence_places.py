"""The sites that an update is looked at from, and how they relate to its completions."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdyn.dynamics import sites_from_rollout
from jaxdyn.hosts import fetch
from jaxdyn.types import Rollout, Sites


class Related(NamedTuple):
    """Of every site [O] the completion and its slot that it is, and the group of its prompt, or -1;
    and the group of every completion [U]."""

    site_completion: np.ndarray
    site_slot: np.ndarray
    site_group: np.ndarray
    group: np.ndarray


def batch_sites(
    rollout: Rollout, site_completions: int, sites_per_completion: int, seed: int
) -> Sites:
    """Places in the batch's own completions; the rows of `Sites` number the completions."""
    sites = sites_from_rollout(rollout, sites_per_completion, seed)
    rows = np.asarray(sites.rows)
    there = np.unique(rows)
    if site_completions and site_completions < len(there):
        places = np.linspace(0, len(there) - 1, site_completions).round().astype(int)
        there = there[places]
    kept = np.flatnonzero(np.isin(rows, there))
    pick = {k: getattr(sites, k)[kept] for k in ("rows", "positions", "targets", "is_prompt")}
    return dataclasses.replace(sites, **pick)


def relate(sites: Sites, rollout: Rollout, of_batch: bool) -> Related:
    """How the sites relate to the completions; prompts are the same if their tokens are.

    Args:
      of_batch: whether the sites' sequences are the completions.
    """
    numbers: dict[tuple, int] = {}
    ids, present = np.asarray(rollout.prompt_ids), np.asarray(rollout.prompt_mask)
    group = np.array(
        [numbers.setdefault(tuple(x[m]), len(numbers)) for x, m in zip(ids, present, strict=True)]
    )
    rows, positions, first = fetch((sites.rows, sites.positions, sites.is_prompt))
    if of_batch:
        return Related(rows, positions - (ids.shape[1] - 1), group[rows], group)
    tokens, mask = fetch((sites.tokens, sites.mask))
    ends = {row: place for row, place, at in zip(rows, positions, first, strict=True) if at}
    prompt = lambda row: tuple(tokens[row, : ends[row] + 1][mask[row, : ends[row] + 1]])
    of_row = {row: numbers.get(prompt(row), -1) for row in ends}
    site_group = np.array([of_row.get(row, -1) for row in rows])
    nowhere = np.full(len(rows), -1)
    return Related(nowhere, nowhere, site_group, group)


def token_places(rollout: Rollout, which: tuple[int, ...]) -> np.ndarray:
    """(completion, slot) of every token of the completions numbered `which`, [M, 2]."""
    mask = np.asarray(rollout.completion_mask)
    return np.array([(u, c) for u in which for c in np.flatnonzero(mask[u])], np.int64)


def own_weights(weights: np.ndarray, related: Related) -> jnp.ndarray:
    """∂loss/∂ log π and ∂loss/∂H of the sites' own tokens, [O, 2]."""
    return jnp.asarray(weights[related.site_completion, related.site_slot])
