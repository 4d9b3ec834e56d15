"""Scalar heads on the features: a value of every prefix, and scores of whole sequences.

A sequence's score is r = ⟨w, φ⟩ at its last token, one number a row of the head. ArmoRM (Wang et
al. 2024, arXiv 2406.12845) takes its rows r for objectives, and weighs them by what the features p
at the end of the prompt say:

    score = Σ_k g_k (r T)_k,      g = c · softmax(MLP(p) / temperature)

with T the reward transform, which takes a share of one objective from the others.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxdyn.models.config import Gating, ModelConfig, SequenceHead
from jaxdyn.types import JaxdynError, Params


def init_value_head(width: int) -> Params:
    """A head that values everything at 0, so that advantages begin as plain returns."""
    return {"weight": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def state_values(head: Params, features: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """v = ⟨w, φ⟩ + b, in float32 or better."""
    wide = jnp.promote_types(features.dtype, head["weight"].dtype)
    return features.astype(wide) @ head["weight"] + head["bias"]


# -- scores of sequences --------------------------------------------------------------------------


def add_sequence_head(
    model: Any, params: Params, labels: int = 1, pad_id: int | None = None
) -> tuple[Any, Params]:
    """A language model's body with a head that scores every sequence 0: what training starts from.

    Raises:
      JaxdynError: if it has such a head already.
    """
    if model.config.head is not None:
        raise JaxdynError(f"the model has a head of {model.config.head.labels} rows already")
    head = SequenceHead(labels, pad_id)
    config = dataclasses.replace(model.config, head=head, tied=False, classifier_bias=False)
    zeros = jnp.zeros((labels, config.width), jnp.float32)
    params = {"backbone": params["backbone"], "classifier": {"weight": zeros}}
    return dataclasses.replace(model, config=config), params


def sequence_scores(
    model: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    turns: Int[Array, " B"] | None = None,
) -> Float[Array, "B K"]:
    """Every sequence's scores, in float32 or better, read at its last token, padded on either side.

    `tokens` end where the head reads them: what comes after (`SequenceHead.pad_id`) is not among
    them (`jaxdyn.data.conversations`). A gated head reads the slots `turns` too.
    """
    features = model.features(model.view(params)["backbone"], tokens, mask)
    rows, slots = jnp.arange(len(tokens)), jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(mask, slots[None], 0), axis=1)
    scores = model.logits(model.view(params)["classifier"], features[rows, last])
    if "gating" not in params:
        return scores
    return gated(params["gating"], model.config.gating, scores, features[rows, turns])


TURN = (128009, 128006, 78191, 128007, 271)
"""What begins the assistant's answer in Llama3's chat template: where ArmoRM's gate reads."""


def read_by(config: ModelConfig, ids: list[int]) -> list[int]:
    """A sequence's tokens up to the last that is not `pad_id`; of a gated head up to the first that
    is. At least one is left."""
    pad = None if config.head is None else config.head.pad_id
    if config.gating is not None:
        first = ids.index(pad) if pad is not None and pad in ids else 0
        return ids[:first] or ids
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def turn_in(ids: list[int]) -> int:
    """Where the last `TURN` begins; JaxdynError if there is none."""
    places = range(len(ids) - len(TURN), -1, -1)
    for place in places:
        if tuple(ids[place : place + len(TURN)]) == TURN:
            return place
    raise JaxdynError(
        "the gate reads where the assistant's answer begins, tokens "
        f"{', '.join(map(str, TURN))}, and the text has them nowhere"
    )


def gated(
    params: Params, gating: Gating, rewards: Float[Array, "B K"], features: Float[Array, "B D"]
) -> Float[Array, "B 1"]:
    """The objectives as the gate weighs them; see above."""
    x = features.astype(rewards.dtype)
    for number in range(gating.layers + 1):
        layer = params[f"layer_{number}"]
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"][None]
    weights = params["logit_scale"][None] * jax.nn.softmax(x / gating.temperature, axis=-1)
    return jnp.sum(weights * (rewards @ params["transform"]), axis=-1, keepdims=True)


def init_gating(gating: Gating, width: int, labels: int, key: PRNGKeyArray) -> Params:
    """A gate as drawn at random; its transform leaves the objectives alone."""
    sizes = [width, *[gating.width] * gating.layers, labels]
    layers: Params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (rows, columns), jnp.float32)
        layers[f"layer_{i}"] = {
            "kernel": kernel / rows**0.5,
            "bias": jnp.zeros(columns, jnp.float32),
        }
    transform = jnp.eye(labels, dtype=jnp.float32)
    return {**layers, "logit_scale": jnp.ones(1, jnp.float32), "transform": transform}
