"""Sites from prompts, from texts and from a rollout."""

import jax.numpy as jnp
import numpy as np

from jaxdyn.data import (
    character_tokenizer,
    decode_completions,
    encode_prompts,
    encode_supervised,
)
from jaxdyn.dynamics import rollout_from_texts, site_texts, sites_from_prompts, sites_from_texts
from jaxdyn.dynamics import sites_from_rollout as choose
from jaxdyn.types import Rollout

TOKENIZER = character_tokenizer("0123456789=ab")
ASKED, SAID = ["1=", "234=", "5="], ["ab", "b", "aaab"]


def rollout(lengths):
    slots = max(lengths)
    mask = np.arange(slots)[None] < np.array(lengths)[:, None]
    ids = np.arange(len(lengths) * slots).reshape(-1, slots)
    prompt = np.full((len(lengths), 3), 99)
    return Rollout(
        jnp.asarray(prompt),
        jnp.ones(prompt.shape, bool),
        jnp.asarray(ids),
        jnp.asarray(mask),
        jnp.zeros(ids.shape),
    )


def test_sites_are_the_prompts_end_and_places_inside_the_completion():
    sampled = rollout([4, 1, 2])
    sites = choose(sampled, sites_per_completion=2, seed=0)
    rows, positions = np.asarray(sites.rows), np.asarray(sites.positions)
    np.testing.assert_array_equal(rows, [0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(sites.is_prompt, [True, False, False, True, True, False])
    # Slot 2 is the prompts' last; what a site predicts stands one slot further.
    np.testing.assert_array_equal(positions[np.asarray(sites.is_prompt)], [2, 2, 2])
    np.testing.assert_array_equal(np.asarray(sites.tokens)[rows, positions + 1], sites.targets)
    assert np.asarray(sites.mask)[rows, positions + 1].all()
    again = choose(sampled, sites_per_completion=2, seed=0)
    np.testing.assert_array_equal(again.positions, positions)


def test_sites_of_prompts_are_their_last_tokens():
    sites = sites_from_prompts(encode_prompts(TOKENIZER, ASKED, 16))
    assert sites.rows.tolist() == [0, 1, 2] and sites.is_prompt.all()
    assert site_texts(TOKENIZER, sites)[0] == ASKED
    assert sites.mask[:, -1].all() and set(sites.positions.tolist()) == {sites.tokens.shape[1] - 1}


def test_sites_of_texts_are_those_of_the_same_texts_as_a_rollout():
    """One padded on the right, the other in the middle: the same choice, texts and targets."""
    encoded = encode_supervised(TOKENIZER, ASKED, SAID, 16)
    sites = sites_from_texts(*encoded, sites_per_completion=2, seed=3)
    # "b" has its stop token alone behind the first.
    assert sites.rows.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    contexts, targets = site_texts(TOKENIZER, sites)
    first = np.flatnonzero(np.asarray(sites.is_prompt))
    assert [contexts[n] for n in first] == ASKED
    assert [targets[n] for n in first] == ["a", "b", "a"]
    assert (contexts[4], targets[4]) == ("234=b", "</s>")
    whole = [asked + said for asked, said in zip(ASKED, SAID, strict=True)]
    for row, context, target in zip(sites.rows.tolist(), contexts, targets, strict=True):
        assert f"{whole[row]}</s>".startswith(context + target)

    prompts = encode_prompts(TOKENIZER, ASKED, 16)
    given = rollout_from_texts(prompts, *encoded, max_completion_length=8)
    assert given.completion_mask.sum(axis=1).tolist() == [3, 2, 5]
    again = choose(given, 2, 3)
    assert site_texts(TOKENIZER, again) == (contexts, targets)
    np.testing.assert_array_equal(again.targets, sites.targets)


def test_given_completions_are_cut():
    prompts = encode_prompts(TOKENIZER, ASKED, 16)
    encoded = encode_supervised(TOKENIZER, ASKED, SAID, 16)
    given = rollout_from_texts(prompts, *encoded, max_completion_length=2)
    texts, finished, _ = decode_completions(TOKENIZER, given.completion_ids, given.completion_mask)
    assert texts == ["ab", "b", "aa"] and finished == [False, True, False]
    np.testing.assert_array_equal(given.prompt_ids, prompts.prompt_ids)
