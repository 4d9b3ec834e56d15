"""Texts as what a kernel lies between: sites inside them, or their completions whole."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.commands.kernel_subject import Subject
from jaxdyn.commands.text_options import TextOptions
from jaxdyn.data import encode_prompts, encode_supervised
from jaxdyn.dynamics import rollout_from_texts, site_texts, sites_from_prompts, sites_from_rollout
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel
from jaxdyn.types import JaxdynError, Params, Rollout, Sites


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


def prompt_places(options: TextOptions, subject: Subject, texts: Texts) -> Places:
    """Each prompt's last token, with the model's most likely next token for its target.

    Raises:
      JaxdynError: for a prompt without a token, longer than `max_prompt_length` or the context.
    """
    model, tokenizer = subject.model, subject.tokenizer
    view = model.view(subject.params)
    sites = sites_from_prompts(encode_prompts(tokenizer, texts.prompts, options.max_prompt_length))
    require_context(model, sites)
    features = site_features(model, view["backbone"], sites)
    likely = fetch(jnp.argmax(model.logits(view["classifier"], features), axis=1))
    sites = dataclasses.replace(sites, targets=jnp.asarray(likely, jnp.int32))
    likely_text = "the model's most likely next token"
    return Places(sites, None, features, *site_texts(tokenizer, sites), likely_text)


def completion_places(
    options: TextOptions, subject: Subject, texts: Texts, with_features: bool = True
) -> Places:
    """Each prompt's last token and places inside its completion; the targets are the next tokens.

    Whole completions have all their places, and no features.

    Raises:
      JaxdynError: as `prompt_places`, of prompt and completion together.
    """
    model, tokenizer, whole = subject.model, subject.tokenizer, options.quantity == "sequence"
    prompts = encode_prompts(tokenizer, texts.prompts, options.max_prompt_length)
    encoded = encode_supervised(tokenizer, texts.prompts, texts.completions or [], 2**31)
    rollout = rollout_from_texts(prompts, *encoded, options.max_completion_length)
    inside = rollout.completion_ids.shape[1] if whole else options.sites_per_completion
    sites = sites_from_rollout(rollout, inside, options.seed)
    require_context(model, sites)
    if whole:
        ids, mask = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask)
        kept = [tokenizer.decode_completion(x[m].tolist()) for x, m in zip(ids, mask, strict=True)]
        return Places(sites, rollout, None, texts.prompts, kept, "every token of the completion")
    features = None
    if with_features:
        features = site_features(model, model.view(subject.params)["backbone"], sites)
    contexts, targets = site_texts(tokenizer, sites)
    return Places(sites, None, features, contexts, targets, "the completion's next token")


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

    mask = jnp.asarray(sites.mask)

    def feature(site):
        row, position = site
        whole = model.features(backbone, sites.tokens[row][None], mask[row][None])
        return whole[0, position]

    return jax.lax.map(feature, (sites.rows, sites.positions), batch_size=16)
