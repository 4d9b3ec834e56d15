"""The texts a ledger is of: prompts, and completions given or sampled, every token a site."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxdyn.commands.checkpoints import Checkpoints
from jaxdyn.commands.kernel_places import require_context
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.data import (
    DataConfig,
    JsonlFile,
    Tokenizer,
    encode_prompts,
    encode_supervised,
    read_examples,
    written,
)
from jaxdyn.dynamics import rollout_from_texts, sites_from_rollout
from jaxdyn.rollout import generate
from jaxdyn.types import JaxdynError, Rollout, Sites

BY_TOKEN = ("completion_ids", "completion_mask", "per_token_logps")


class LedgerTexts(NamedTuple):
    """B texts: their sites, prompts, what each site's token reads as, and who wrote which."""

    sites: Sites
    prompts: list[str]
    pieces: list[str]
    writers: list[str]


def texts_of(options: LedgerOptions, checkpoints: Checkpoints) -> tuple[LedgerTexts, bool]:
    """The texts, and whether the file has more than `limit` lines.

    Raises:
      JaxdynError: for a file or a line that cannot be read, or a text that does not fit the model.
    """
    file = JsonlFile(options.prompts, options.prompt_field, options.completion_field)
    found, more = read_examples(file, options.limit)
    tokenizer, how = checkpoints.tokenizer, DataConfig(prompt_template=options.prompt_template)
    rows = [written(row, how, tokenizer) for row in found]
    asked = [row["prompt"] for row in rows]
    prompts = encode_prompts(tokenizer, asked, options.max_prompt_length)
    if options.completion_field is not None:
        completions = [row["completion"] for row in rows]
        encoded = encode_supervised(tokenizer, asked, completions, 2**31)
        rollouts = {"file": rollout_from_texts(prompts, *encoded, options.max_completion_length)}
    else:
        which = {"first": [0], "last": [-1], "both": [0, -1]}[options.sample or "last"]
        rollouts = {
            checkpoints.names[i]: generate(
                checkpoints.model,
                checkpoints[i],
                prompts,
                jax.random.key(options.seed),
                num_generations=1,
                max_completion_length=options.max_completion_length,
                temperature=options.temperature,
                stop_ids=tokenizer.stop_ids,
                pad_id=tokenizer.pad_id,
            )
            for i in which
        }
    rollout = one_of(list(rollouts.values()))
    longest = rollout.completion_ids.shape[1]
    if not longest:
        raise JaxdynError(f"{options.prompts}: no completion has a token")
    sites = sites_from_rollout(rollout, longest, 0)
    require_context(checkpoints.model, sites)
    writers = [name for name in rollouts for _ in rows]
    return LedgerTexts(
        sites, asked * len(rollouts), pieces_of(tokenizer, sites, len(writers)), writers
    ), more


def one_of(rollouts: list[Rollout]) -> Rollout:
    """Rollouts of the same prompts as one, cut to the longest completion."""
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts)
    longest = int(joined.completion_mask.sum(axis=1).max())
    cut = {name: getattr(joined, name)[:, :longest] for name in BY_TOKEN}
    return dataclasses.replace(joined, **cut)


def pieces_of(tokenizer: Tokenizer, sites: Sites, count: int) -> list[str]:
    """What every site's token adds to its text."""
    rows, targets = np.asarray(sites.rows), np.asarray(sites.targets)
    return [x for b in range(count) for x in tokenizer.pieces(targets[rows == b].tolist())]


def token_pieces(tokenizer: Tokenizer, ids: Int[np.ndarray, "N A"]) -> np.ndarray:
    """What each token reads as by itself, [N, A]."""
    found, places = np.unique(ids, return_inverse=True)
    texts = np.array(["".join(tokenizer.pieces([int(i)])) for i in found], np.str_)
    return texts[places].reshape(ids.shape)
