"""What claims about a run's changes share: checkpoints, held-out tokens, single updates.

Held-out prompts are in no batch, so that whatever moves their sites comes from other prompts.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from frame import arms, trainings

from jaxdyn.dynamics import (
    Ledger,
    delta_logits,
    ledger,
    reward_weights,
    site_features,
    sites_from_rollout,
)
from jaxdyn.dynamics.precision import exact_products, in_float32
from jaxdyn.rollout import step_key
from jaxdyn.train import SavedRun, open_run
from jaxdyn.train.experience import gather_experience
from jaxdyn.train.policy import completion_statistics
from jaxdyn.train.probe import policy_of
from jaxdyn.train.retake import UpdateTaken, loss_weights, take_updates
from jaxdyn.train.sharing import completion_features
from jaxdyn.train.step import Prepared, prepare_step
from jaxdyn.types import Model, Params, Rollout, Sites

PARTS = ("representation", "gradient")


class Counts(NamedTuple):
    """How much is looked at: held-out prompts, their generations, single updates of a run, and how
    often advantages are shuffled."""

    prompts: int
    generations: int
    updates: int
    shuffles: int


COUNTS = {
    "toy": Counts(3, 2, 1, 8),
    "brief": Counts(8, 4, 1, 200),
    "small": Counts(16, 8, 2, 200),
    "full": Counts(64, 8, 5, 1000),
}


# -- runs -----------------------------------------------------------------------------------------


def each_seed(
    chosen: argparse.Namespace, arm: str, look: Callable[[SavedRun, Counts], Any]
) -> dict[str, Any]:
    """`look` at every training of an arm, by its seed; a base model's name goes with it."""
    found = {}
    for path in trainings(chosen.runs, arm):
        with open_run(path) as saved:
            base = base_of(saved)
            rows = look(saved, COUNTS[chosen.size])
        found[path.name] = {"base": base, **rows}
        print(f"{arm}/{path.name}: done", flush=True)
    return found


def base_of(saved: SavedRun) -> str:
    """The name of the model that training started from, without where it lies."""
    path = Path(saved.config.model.path)
    return path.parent.name if path.name == "model" else path.name


def plain_arm(runs: Path) -> str:
    """The arm of standard RL with one learning rate for all."""
    return next(arm for arm in ("joint", "joint-m1") if arm in arms(runs))


def policies(saved: SavedRun) -> Iterator[Params]:
    """The policy before training and at every checkpoint."""
    yield policy_of(saved.loaded.params)
    for step in saved.steps:
        if step:
            yield policy_of(saved.state(step).params)


def followed(saved: SavedRun, count: int, steps: int = 1) -> list[int]:
    """So many checkpoints, evenly over the run, which at least `steps` of its steps follow."""
    there = [step for step in saved.steps if step + steps <= saved.plan[-1].end]
    places = np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(int)
    return [there[i] for i in places]


# -- held-out tokens ------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Tokens of completions: the first `count` of the sites, in the order of their texts. The rest
    are one token of one more text, so that all batches of a size share their programs."""

    sites: Sites
    count: int

    @property
    def rows(self) -> np.ndarray:
        """Whose completion's each is."""
        return np.asarray(self.sites.rows)[: self.count]

    @property
    def targets(self) -> np.ndarray:
        """What was sampled there."""
        return np.asarray(self.sites.targets)[: self.count]


def every_token(rollout: Rollout) -> Tokens:
    """All tokens of the completions."""
    texts, slots = rollout.completion_ids.shape
    found, split = sites_from_rollout(rollout, slots, 0), rollout.prompt_ids.shape[1]
    missing = texts * slots - len(found.rows)
    again = lambda x: jnp.concatenate([x, x[:1]])

    def filled(x, value):
        return jnp.concatenate([x, jnp.full(missing, value, x.dtype)])

    sites = Sites(
        tokens=again(found.tokens),
        mask=again(found.mask),
        rows=filled(found.rows, texts),
        positions=filled(found.positions, split - 1),
        targets=filled(found.targets, 0),
        is_prompt=filled(found.is_prompt, True),
    )
    return Tokens(sites, len(found.rows))


class HeldOut(NamedTuple):
    """Completions of held-out prompts, and their rewards [P, G]."""

    tokens: Tokens
    rewards: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """R less the mean of its prompt's others, over how many completions there are, of every
        token: Σ gain · Δ log π is the reward's change to first order."""
        weights = reward_weights(self.rewards, np.zeros_like(self.rewards))
        return weights.ravel()[self.tokens.rows]


def held_out(saved: SavedRun, params: Params, counts: Counts, seed: int = 0) -> HeldOut:
    """What `params` say to held-out prompts."""
    task, key = saved.task, step_key(saved.config.seed, "probe", seed)
    found = gather_experience(task, params, task.test[: counts.prompts], key, counts.generations)
    rewards = np.nan_to_num(found.rewards.total).reshape(-1, counts.generations)
    return HeldOut(every_token(found.rollout), rewards)


def account(saved: SavedRun, path: Iterable[Params], tokens: Tokens, **options: Any) -> Ledger:
    """The ledger along a path, at the tokens alone; `options` are the ledger's."""
    found = ledger(in_float32(saved.task.model), path, tokens.sites, **options)
    texts = len(tokens.sites.tokens) - 1
    of_tokens = lambda tree: jax.tree.map(lambda x: x[:, : tokens.count], tree)
    return dataclasses.replace(
        found,
        values=of_tokens(found.values),
        parts=of_tokens(found.parts),
        by_layer=jax.tree.map(lambda x: x[:, :texts], found.by_layer),
    )


class Segment(NamedTuple):
    """From one checkpoint to the next: completions sampled at its beginning, log π [N, V] there,
    the account at their tokens, and the weights w [N] with which Σ w Δ log π is the reward's
    change."""

    look: HeldOut
    before: np.ndarray
    account: Ledger
    weights: np.ndarray


def segments(saved: SavedRun, counts: Counts, **options: Any) -> Iterator[Segment]:
    """Every segment of a run; `options` are the ledger's."""
    path = policies(saved)
    start = next(path)
    for number, end in enumerate(path):
        look = held_out(saved, start, counts, number)
        found, rows = account(saved, [start, end], look.tokens, **options), look.tokens.rows
        own = np.bincount(rows, found.change("log_prob")[0], look.rewards.size)
        weights = reward_weights(look.rewards, own.reshape(look.rewards.shape)).ravel()
        before = log_probs_at(saved.task.model, start, look.tokens)
        yield Segment(look, before, found, weights[rows])
        start = end


# -- single updates -------------------------------------------------------------------------------


def taken(saved: SavedRun, step: int) -> tuple[Prepared, UpdateTaken]:
    """The batch of the step that follows a checkpoint, and the first update by it."""
    stage, state = saved.begin(step)
    prepared = prepare_step(saved.task, state, stage, step)
    return prepared, next(take_updates(saved.task, state, stage, prepared))


def log_probs_at(model: Model, params: Params, tokens: Tokens) -> np.ndarray:
    """log π [N, V] at the tokens, of a float32 pass or better."""
    found = _log_probs_at(in_float32(model), params, tokens.sites)
    return np.asarray(found[: tokens.count], np.float64)


def first_order(
    model: Model, params: Params, change: Params, tokens: Tokens
) -> dict[str, np.ndarray]:
    """Δf [N, V] of a change of the parameters by component (of a tied matrix by role)."""
    found = _first_order(in_float32(model), params, change, tokens.sites)
    return {part: np.asarray(getattr(found, part)[: tokens.count], np.float64) for part in PARTS}


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def _log_probs_at(model, params, sites):
    view = model.view(params)
    phi = site_features(model, view["backbone"], sites)
    return jax.nn.log_softmax(model.logits(view["classifier"], phi))


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def _first_order(model, params, change, sites):
    return delta_logits(model, params, change, sites)[1]


def entropies(log_probs: np.ndarray) -> np.ndarray:
    """H of log π [N, V], in nats."""
    return -np.sum(np.exp(log_probs) * log_probs, axis=-1)


def entropy_change(log_probs: np.ndarray, change: np.ndarray) -> np.ndarray:
    """ΔH = −Σ_v π_v (log π_v + H) Δf_v of a change of the logits, to first order, [N]."""
    centred = log_probs + entropies(log_probs)[:, None]
    return -np.sum(np.exp(log_probs) * centred * change, axis=-1)


def target_change(log_probs: np.ndarray, change: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Δ log π(y) = Δf_y − πᵀΔf of the sites' tokens, to first order, [N]."""
    own = np.take_along_axis(change, targets[:, None], axis=1)[:, 0]
    return own - np.sum(np.exp(log_probs) * change, axis=-1)


def unit_weights(task: Any, params: Params, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """∂loss/∂ log π and ∂loss/∂H of the tokens [B, C, 2]: per unit of advantage, and at none.

    At ratio 1, as in a step's first update, the loss is linear in the advantages.
    """
    batch = prepared.batch
    at = lambda a: np.asarray(
        loss_weights(task, params, prepared._replace(batch=batch.replace(advantages=a)))
    )
    ones = jnp.ones_like(batch.advantages)
    without = at(jnp.zeros_like(ones))
    return at(ones) - without, without


def shuffled(advantages: np.ndarray, generations: int, count: int, seed: int = 0) -> np.ndarray:
    """The advantages given to a prompt's completions at random, [count, B].

    A prompt's completions are alike in law, so that this breaks nothing but what reward had to do
    with them.
    """
    rng = np.random.default_rng(seed)
    groups = np.broadcast_to(
        advantages.reshape(-1, generations), (count, len(advantages) // generations, generations)
    )
    return rng.permuted(groups, axis=2).reshape(count, -1)


@functools.partial(jax.jit, static_argnums=0)
@exact_products
def loss_gradient(
    model: Model, params: Params, batch: Any, weights: jax.Array, temperature: jax.Array
) -> Params:
    """Σ_uc w_uc0 ∇ log π(y_uc) + w_uc1 ∇H_uc of a batch's tokens, shaped as the parameters."""
    model = in_float32(model)

    def value(params):
        view = model.view(params)
        phi = completion_features(model, view["backbone"], batch)
        classifier, ids = view["classifier"], batch.completion_ids
        found = completion_statistics(model, classifier, phi, ids, temperature)
        terms = weights[..., 0] * found.logps + weights[..., 1] * found.entropy
        return jnp.sum(jnp.where(batch.completion_mask, terms, 0))

    return jax.grad(value)(params)


@jax.jit
def scaled(change: Params, by: Any) -> Params:
    """by · change."""
    return jax.tree.map(lambda x: jnp.asarray(by, x.dtype) * x, change)


@jax.jit
def along(metric: Params, gradient: Params) -> Params:
    """−M ⊙ g: a step of the optimizer's metric without momentum."""
    return jax.tree.map(lambda m, g: -m * g, metric, gradient)


@jax.jit
def plus(params: Params, change: Params) -> Params:
    """params + change."""
    return jax.tree.map(jnp.add, params, change)


def only(part: str, change: Params) -> Params:
    """The change of the classifier or of the backbone alone."""
    still = jax.tree.map(jnp.zeros_like, change)
    return {**still, part: change[part]}


def second_order_kl(log_probs: np.ndarray, change: np.ndarray) -> float:
    """½ Var_π(Δf), the KL of a change of the logits to second order, mean over sites, in nats."""
    probs = np.exp(log_probs)
    centred = change - np.sum(probs * change, axis=-1, keepdims=True)
    return float(np.mean(np.sum(probs * centred**2, axis=-1)) / 2)
