"""Sequences that begin alike, as one row that branches: what they begin with is passed once.

A product along a change of the parameters needs φ at every site, and one back from a field only
the sum of its gradients, in which the shared slots' cotangents add up. So both are the same on rows
of a prompt and its completions (`jaxdyn.types.Branches`), with fewer slots.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxdyn.types import Branches, Sites

LEAST_GAIN = 1.1
"""By how many times fewer slots rows branch."""


def branched(sites: Sites) -> Sites:
    """The sites in rows that are each a prompt and the sequences that go on from it.

    Sequences without sites are left out. The sites are as they are where their prompts end at
    different slots, or where that saves too little.
    """
    rows, positions = np.asarray(sites.rows), np.asarray(sites.positions)
    ends = np.unique(positions[np.asarray(sites.is_prompt)])
    if isinstance(sites.mask, Branches) or len(ends) != 1 or ends[0] + 1 == sites.tokens.shape[1]:
        return sites
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    split = int(ends[0]) + 1
    slots = tokens.shape[1] - split
    used, sequence = np.unique(rows, return_inverse=True)
    begins = np.where(mask, tokens, -1)[used, :split]
    _, first, prompt = np.unique(begins, axis=0, return_index=True, return_inverse=True)
    prompt = prompt.reshape(-1)
    # A sequence's place among those of its prompt.
    order = np.argsort(prompt, kind="stable")
    counts = np.bincount(prompt)
    branch = np.empty_like(order)
    branch[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    most = int(counts.max())
    if len(used) * tokens.shape[1] < LEAST_GAIN * len(first) * (split + most * slots):
        return sites
    ids = np.zeros((len(first), most, slots), np.int32)
    there = np.zeros(ids.shape, bool)
    ids[prompt, branch], there[prompt, branch] = tokens[used, split:], mask[used, split:]
    whole = np.concatenate([tokens[used[first], :split], ids.reshape(len(first), -1)], axis=1)
    inside = positions >= split
    return dataclasses.replace(
        sites,
        tokens=jnp.asarray(whole),
        mask=Branches(jnp.asarray(mask[used[first], :split]), jnp.asarray(there)),
        rows=jnp.asarray(prompt[sequence], jnp.int32),
        positions=jnp.asarray(positions + inside * branch[sequence] * slots, jnp.int32),
    )
