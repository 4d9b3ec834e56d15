"""Texts as what a kernel lies between: sites inside them, or their completions whole."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.data import Tokenizer, encode_prompts, encode_supervised
from jaxdyn.dynamics import sites_from_rollout
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError, Params, PromptBatch, Rollout, Sites

CONTEXT = 16
"""How many tokens before a site are kept as its text."""


class Texts(NamedTuple):
    """B prompts, and their completions where there are some."""

    prompts: list[str]
    completions: list[str] | None


class Places(NamedTuple):
    """N places: the sites, or the B completions of `rollout` with all of their sites.

    `contexts` and `target_texts` say of each place what comes before it and what is predicted;
    `targets` in words what the sites' targets are; `features` is φ at the sites, [N, D].
    """

    sites: Sites
    rollout: Rollout | None
    features: jax.Array | None
    contexts: list[str]
    target_texts: list[str]
    targets: str


def prompt_places(
    model: LanguageModel, params: Params, tokenizer: Tokenizer, texts: Texts, max_prompt_length: int
) -> Places:
    """Each prompt's last token, with the model's most likely next token for its target.

    Raises:
      JaxdynError: for a prompt without a token, longer than `max_prompt_length` or the context.
    """
    view = model.view(params)
    sites = last_tokens(encode_prompts(tokenizer, texts.prompts, max_prompt_length))
    require_context(model, sites)
    features = site_features(model, view["backbone"], sites)
    likely = fetch(jnp.argmax(model.logits(view["classifier"], features), axis=1))
    sites = dataclasses.replace(sites, targets=jnp.asarray(likely, jnp.int32))
    likely_text = "the model's most likely next token"
    return Places(sites, None, features, *site_texts(tokenizer, sites), likely_text)


def completion_places(
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    texts: Texts,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    sites_per_completion: int | None,
    seed: int,
) -> Places:
    """Each prompt's last token and places inside its completion; the targets are the next tokens.

    Args:
      max_completion_length: completions are cut after so many tokens.
      sites_per_completion: how many inside each; None for the completions whole.
      seed: of the choice of sites.

    Raises:
      JaxdynError: as `prompt_places`, of prompt and completion together.
    """
    prompts = encode_prompts(tokenizer, texts.prompts, max_prompt_length)
    ids, mask = completion_tokens(tokenizer, texts, max_completion_length)
    rollout = Rollout(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        completion_ids=jnp.asarray(ids),
        completion_mask=jnp.asarray(mask),
        per_token_logps=jnp.zeros(ids.shape, jnp.float32),
    )
    whole = sites_per_completion is None
    inside = ids.shape[1] if sites_per_completion is None else sites_per_completion
    sites = sites_from_rollout(rollout, inside, seed)
    require_context(model, sites)
    if whole:
        kept = [
            tokenizer.decode_completion(row[m].tolist()) for row, m in zip(ids, mask, strict=True)
        ]
        return Places(sites, rollout, None, texts.prompts, kept, "every token of the completion")
    features = site_features(model, model.view(params)["backbone"], sites)
    contexts, targets = site_texts(tokenizer, sites)
    return Places(sites, None, features, contexts, targets, "the completion's next token")


def last_tokens(prompts: PromptBatch) -> Sites:
    """Each prompt's last token as a site; the targets are 0."""
    count, slots = prompts.prompt_ids.shape
    nothing = jnp.zeros(count, jnp.int32)
    return Sites(
        tokens=prompts.prompt_ids,
        mask=prompts.prompt_mask,
        rows=jnp.arange(count, dtype=jnp.int32),
        positions=jnp.full_like(nothing, slots - 1),
        targets=nothing,
        is_prompt=jnp.ones(count, bool),
    )


def completion_tokens(
    tokenizer: Tokenizer, texts: Texts, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Completions with their stop token, cut after `longest` tokens: ids and mask, [B, C]."""
    encoded = encode_supervised(tokenizer, texts.prompts, texts.completions or [], 2**31)
    tokens, mask, predicted = (np.asarray(x) for x in encoded)
    count = min(longest, int(predicted.sum(axis=1).max()))
    at = (mask & ~predicted).sum(axis=1, keepdims=True) + np.arange(count)[None]
    spare = ((0, 0), (0, count))
    cut = lambda x, fill: np.take_along_axis(np.pad(x, spare, constant_values=fill), at, axis=1)
    return cut(tokens, tokenizer.pad_id), cut(predicted, False)


def require_context(model: LanguageModel, sites: Sites) -> None:
    """JaxdynError if a text is longer than the model's context."""
    lengths = np.asarray(sites.mask).sum(axis=1)
    row = int(np.argmax(lengths))
    if lengths[row] > model.config.max_positions:
        raise JaxdynError(
            f"example {row} has {lengths[row]} tokens; the model's context is "
            f"{model.config.max_positions}"
        )


@functools.partial(jax.jit, static_argnums=0)
def site_features(model: LanguageModel, backbone: Params, sites: Sites) -> jax.Array:
    """φ at the sites [N, D], a few texts at a time."""

    def feature(site):
        row, position = site
        whole = model.features(backbone, sites.tokens[row][None], sites.mask[row][None])
        return whole[0, position]

    return jax.lax.map(feature, (sites.rows, sites.positions), batch_size=16)


def site_texts(tokenizer: Tokenizer, sites: Sites) -> tuple[list[str], list[str]]:
    """The end of the text before each site, and the token predicted there."""
    contexts, targets = [], []
    tokens, mask = np.asarray(sites.tokens), np.asarray(sites.mask)
    numbers = (np.asarray(x).tolist() for x in (sites.rows, sites.positions, sites.targets))
    for row, position, target in zip(*numbers, strict=True):
        before = tokens[row, : position + 1][mask[row, : position + 1]]
        contexts.append(tokenizer.decode_completion(before[-CONTEXT:].tolist()))
        text = tokenizer.decode_completion([target])
        targets.append(text or tokenizer.backend.id_to_token(target) or f"<{target}>")
    return contexts, targets
