"""The page of a step: its texts token by token, with the completions that moved each site."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxdyn
from jaxdyn.commands.ledger_texts import token_pieces
from jaxdyn.data import Tokenizer
from jaxdyn.dynamics import Ledger, ledger, most_changed_tokens
from jaxdyn.report.influence_file import FUNCTIONS, SavedInfluence
from jaxdyn.report.ledger_file import SavedLedger
from jaxdyn.report.microscope import Influence, microscope_pages
from jaxdyn.types import COMPONENTS, Model, Params, Sites


def every_token(sites: Sites) -> Sites:
    """Every place in the completions that hold the sites, each from where its prompt ends."""
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    rows, positions = np.asarray(sites.rows), np.asarray(sites.positions)
    places = [
        (row, slot, slot == start)
        for row in np.unique(rows)
        for start in [positions[rows == row].min()]
        for slot in range(start, int(np.flatnonzero(mask[row])[-1]))
    ]
    row, slot, first = (np.array(x) for x in zip(*places, strict=True))
    return dataclasses.replace(
        sites,
        rows=jnp.asarray(row, jnp.int32),
        positions=jnp.asarray(slot, jnp.int32),
        targets=jnp.asarray(tokens[row, slot + 1], jnp.int32),
        is_prompt=jnp.asarray(first),
    )


ALTERNATIVES = 8
"""Other tokens that are followed at each place, half of them raised, half lowered."""


class StepLedger(NamedTuple):
    """What a step did at N `sites`, those of every token of some completions, by component; and of
    A other tokens there, `alternatives` [N, A]."""

    sites: Sites
    account: Ledger
    alternatives: np.ndarray


def step_ledger(
    model: Model, before: Params, after: Params, sites: Sites, budget: int
) -> StepLedger:
    """At every token of the completions that hold the sites."""
    whole = every_token(sites)
    count = min(ALTERNATIVES, model.config.vocab_size // 2 * 2)
    ids = most_changed_tokens(model, before, after, whole, count, budget)
    found = ledger(
        model,
        iter([before, after]),
        whole,
        token_ids=ids,
        through="features",
        memory_budget=budget,
    )
    return StepLedger(whole, found, ids)


def pages_of(
    saved: SavedInfluence, step: StepLedger, tokenizer: Tokenizer, path: Path
) -> dict[Path, str]:
    """The page at `path`, and those it is continued on."""
    whole, found, ids = step
    fields = [field.name for field in dataclasses.fields(Sites)]
    arrays: dict[str, Any] = {name: np.asarray(getattr(whole, name)) for name in fields}
    rows, positions, targets = (arrays[name] for name in ("rows", "positions", "targets"))
    texts = np.unique(rows)
    starts = {row: positions[rows == row].min() for row in texts}
    prompt = lambda row: tokenizer.decode(
        arrays["tokens"][row, : starts[row] + 1][arrays["mask"][row, : starts[row] + 1]].tolist()
    )
    seen = SavedLedger(
        **arrays,
        prompts=np.array(
            [prompt(row) if row in starts else "" for row in range(len(arrays["tokens"]))], np.str_
        ),
        pieces=np.array(
            [x for row in texts for x in tokenizer.pieces(targets[rows == row].tolist())], np.str_
        ),
        names=np.array([f"before {saved.about['model']}", "after it"], np.str_),
        nodes=found.nodes,
        alternatives=ids,
        alternative_pieces=token_pieces(tokenizer, ids),
        alternative_values=found.token_values,
        alternative_parts=found.token_parts,
        values=found.values,
        parts=found.parts,
        about={"jaxdyn": jaxdyn.__version__, **saved.about},
    )
    number = {place: n for n, place in enumerate(zip(rows, positions, strict=True))}
    at = zip(saved.rows, saved.positions, strict=True)
    components = {name: getattr(saved, name) for name in COMPONENTS}
    shown = {name: x for name, x in components.items() if name != "cross" or np.any(x)}
    advantages = np.asarray(saved.advantages)
    if advantages.ndim == 2:  # a token's own: their mean over the completion
        counted = np.where(saved.completion_mask, advantages, 0).sum(axis=1)
        advantages = counted / np.maximum(saved.completion_mask.sum(axis=1), 1)
    influence = Influence(
        rows=np.array([number[place] for place in at]),
        contributions={
            function: {name: x[q] for name, x in shown.items()}
            for q, function in enumerate(FUNCTIONS)
        },
        texts=saved.completions,
        prompts=saved.prompts,
        advantages=advantages,
        about=f"What each completion of {saved.about['model']} added, to first order; clipping, "
        "momentum, decay and the second order are columns of influence.json.",
    )
    return microscope_pages(seen, path, influence)
