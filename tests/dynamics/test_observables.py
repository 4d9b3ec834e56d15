"""What a change of the logits does to what is observed, against jvps of the functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdyn.dynamics import observables
from jaxdyn.dynamics.observables import (
    QUANTITIES,
    At,
    in_blocks,
    logit_cotangents,
    observe,
    rates,
)
from jaxdyn.models import LanguageModel, llama

SITES, VOCAB = 11, 9


@pytest.fixture
def drawn(x64):
    """What is observed, logits, and two moves of them."""
    rng = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(rng.normal(size=shape))
    ids = jnp.asarray(rng.integers(0, VOCAB, (SITES, 3)))
    return At(ids[:, 0], ids[:, 1:], of(SITES, VOCAB)), of(SITES, VOCAB), tuple(of(2, SITES, VOCAB))


def test_rates_are_the_derivatives(drawn):
    at, logits, moves = drawn
    cotangents = logit_cotangents(at, logits, QUANTITIES)
    for move, (quantities, tokens) in zip(moves, rates(at, logits, moves), strict=True):
        _, expected = jax.jvp(lambda f: observe(at, f), (logits,), (move,))
        np.testing.assert_allclose(quantities.T, expected.quantities, rtol=0, atol=1e-14)
        np.testing.assert_allclose(tokens, expected.tokens, rtol=0, atol=1e-14)
        through = np.einsum("qnv,nv->qn", cotangents, move)
        np.testing.assert_allclose(through, expected.quantities, rtol=0, atol=1e-14)


def test_what_is_added_to_the_first_logits_is_of_no_matter(drawn):
    at, logits, moves = drawn
    there = at._replace(start=at.start + 7.0)
    np.testing.assert_allclose(
        observe(at, logits).quantities, observe(there, logits).quantities, rtol=0, atol=1e-14
    )
    one, other = (rates(x, logits, moves)[0][0] for x in (at, there))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 4, 8], ids="blocks of {}".format)
@pytest.mark.parametrize("tokens", [0, 2], ids="{} further tokens".format)
def test_blocks_change_nothing(drawn, monkeypatch, rows, tokens):
    """Eleven sites: no block but of one divides them, so that the last has some of them again."""
    at, logits, moves = drawn
    at = at._replace(token_ids=at.token_ids[:, :tokens])
    model = LanguageModel(
        llama(vocab_size=VOCAB, width=4, num_layers=1, num_heads=1, mlp_width=4, max_positions=4)
    )
    seen = []

    def counted(at, logits, moves):
        seen.append(len(logits))
        return rates(at, logits, moves)

    whole = in_blocks(model, counted, at, logits, moves)
    monkeypatch.setattr(observables, "BLOCK", rows * VOCAB * logits.dtype.itemsize)
    found = in_blocks(model, counted, at, logits, moves)
    assert seen == [SITES, rows]  # traced once each
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-15)
