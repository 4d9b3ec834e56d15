"""Whom a script of claims asks: a model on its task, and what one update of it would do.

The task goes by the name: "anagram" and "stories260k" are the presets of these models, all others
do the sums of `arithmetic.py`; with `--prompts FILE.jsonl` (a `prompt` a line, a text or messages)
they complete those, and advantages are signs drawn at random. `--model` is a directory in the
Hugging Face layout, or one of several, base-0, base-1, …: base models of different seeds.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import arithmetic
import frame
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdyn.config import RunConfig
from jaxdyn.data import AnagramsConfig, DataConfig
from jaxdyn.dynamics import sites_from_rollout
from jaxdyn.models import LanguageModel
from jaxdyn.optim import OptimConfig, make_optimizer
from jaxdyn.presets import RL
from jaxdyn.rewards import RewardConfig
from jaxdyn.rl import LossConfig, ScoredBatch, estimate_advantages, normalizer_of
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import ModelSource, TrainConfig
from jaxdyn.train import SavedRun
from jaxdyn.train.experience import Experience, gather_experience
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.sharing import completion_features, sequences_of
from jaxdyn.train.task import Task, open_task
from jaxdyn.train.update import policy_objective
from jaxdyn.types import Model, Params, Sites

PRESETS = {"anagram": "quickstart", "stories260k": "stories260k"}


class Subject(NamedTuple):
    """A base model: its name, and its task, which holds model, parameters, prompts and reward."""

    name: str
    task: Task[RunConfig]
    rewarded: bool

    @property
    def model(self) -> LanguageModel:
        return self.task.model

    @property
    def params(self) -> Params:
        return self.task.params


def parser(description: str) -> argparse.ArgumentParser:
    """`frame.parser`, with prompts of one's own."""
    found = frame.parser(description)
    found.add_argument("--prompts", type=Path, help="a file of JSON lines with a `prompt` each")
    return found


def subjects(chosen: argparse.Namespace) -> list[Subject]:
    """The base models in the order of their names, all untied."""
    paths = sorted(chosen.model.glob("base-*")) or [chosen.model]
    return [open_subject(path, chosen.name, getattr(chosen, "prompts", None)) for path in paths]


def base_models(count: int) -> str:
    """So many base models, in words."""
    return f"{count} base model{'s' * (count > 1)}"


def seeds_of(count: int) -> int:
    """Trainings behind a claim about base models: their number; 0 of a single one, which somebody
    else has trained and of which alone the claim is."""
    return count if count > 1 else 0


def open_subject(path: Path, name: str, prompts: Path | None = None) -> Subject:
    """A base model; one that a run left lies in its `model`.

    The anagram model base-K has letters of its own, those of the data's seed K.
    """
    directory = path / "model" if (path / "model").is_dir() else path
    with tempfile.TemporaryDirectory() as written:
        config = config_of(name, prompts, Path(written))
        config = dataclasses.replace(config, model=ModelSource(str(directory), untie=True))
        if config.data.name == "anagrams" and path.name.startswith("base-"):
            letters = AnagramsConfig(
                train_examples=4000, test_examples=200, seed=int(path.name.removeprefix("base-"))
            )
            config = dataclasses.replace(config, data=DataConfig("anagrams", anagrams=letters))
        return Subject(path.name, open_task(config), prompts is None)


def of_run(run: SavedRun) -> Subject:
    """The model with which a run began, on the run's own task."""
    config = run.task.config
    if config.kind == "rl":  # what is asked of its gradients is the reward's
        config = dataclasses.replace(config, loss=LossConfig("dr_grpo"))
    return Subject(run.path.name, dataclasses.replace(run.task, config=config), True)


def config_of(name: str, prompts: Path | None, written: Path) -> RunConfig:
    """What RL of a model of that name is told: by Dr. GRPO, without a KL.

    Sums are `written` to a directory, which need not last: data sets are built once.
    """
    if prompts is not None:
        return RunConfig(
            data=DataConfig("jsonl", path=str(prompts), held_out=0.5, overlong="drop"),
            reward=RewardConfig(("finished",)),
            sampling=SamplingConfig(max_completion_length=32),
            loss=LossConfig("dr_grpo"),
            optim=OptimConfig(learning_rate=3e-6),
            train=TrainConfig(num_prompts=4, num_generations=4, max_prompt_length=96),
        )
    if name in PRESETS:
        config = RL[PRESETS[name]]
    else:
        told = {"schedules": [], "steps": 1, "classifier_steps": 1, "test_problems": 1}
        told |= {"learning_rate": 3e-6, "temperature": 1.0, "output": written, "model": written}
        config = arithmetic.run_config(
            argparse.Namespace(**told), arithmetic.write_problems(written)
        )
    return dataclasses.replace(config, loss=LossConfig("dr_grpo"))


def experience(
    subject: Subject, split: str, prompts: int, generations: int, draw: int, params=None
) -> Experience:
    """Completions of the split's prompts number draw · prompts and on, by the policy, scored."""
    examples = getattr(subject.task, split)
    places = (draw * prompts + np.arange(prompts)) % len(examples)
    key = jax.random.fold_in(jax.random.key(draw), ("train", "test").index(split))
    params = subject.params if params is None else params
    return gather_experience(
        subject.task, params, [examples[int(i)] for i in places], key, generations
    )


def probe_sites(subject: Subject, prompts: int, sites_per_completion: int, draw: int = 0) -> Sites:
    """Sites of held-out prompts, a completion each: a prompt's last token, and some inside."""
    rollout = experience(subject, "test", prompts, 1, draw).rollout
    return sites_from_rollout(rollout, sites_per_completion, draw)


# -- one update -----------------------------------------------------------------------------------


def update_batch(subject: Subject, found: Experience, draw: int) -> UpdateBatch:
    """What the loss takes of completions; where there is no reward A = ±1, drawn."""
    rollout, config = found.rollout, subject.task.config
    rewards = np.asarray(found.rewards.total, np.float32)
    if not subject.rewarded:
        signs = np.tile(np.float32([1, -1]), len(rewards))[: len(rewards)]
        rewards = np.random.default_rng(draw).permutation(signs)
    scored = ScoredBatch(
        rewards=jnp.asarray(rewards),
        finished=jnp.asarray(found.finished),
        completion_mask=rollout.completion_mask,
    )
    limit = config.sampling.max_completion_length
    given = config.advantage, config.loss, scored, found.num_generations, limit
    sequences = sequences_of(rollout, found.num_generations)
    return UpdateBatch(**vars(sequences), advantages=estimate_advantages(*given)[0])


def update_batches(
    subject: Subject, prompts: int, generations: int, count: int, first: int = 0
) -> list[UpdateBatch]:
    """Batches of training prompts, those of which all advantages are 0 left out."""
    batches: list[UpdateBatch] = []
    for draw in range(first, first + 20 * count):
        found = experience(subject, "train", prompts, generations, draw)
        batch = update_batch(subject, found, draw)
        if float(jnp.abs(batch.advantages).max()) > 0:
            batches.append(batch)
        if len(batches) == count:
            return batches
    raise SystemExit(f"{subject.name}: completions of a prompt are almost always rewarded alike")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def loss_gradient(
    model: Model, loss: LossConfig, limit: int, params: Params, batch: UpdateBatch
) -> Params:
    """∇ of the policy loss at ratio 1 and temperature 1, shaped as the parameters."""
    normalizer = normalizer_of(batch.completion_mask, limit)

    def value(view):
        phi = completion_features(model, view["backbone"], batch)
        return policy_objective(model, loss, view, phi, batch, jnp.float32(1), normalizer)[0]

    return model.fold(jax.grad(value)(model.view(params)))


def gradient(subject: Subject, batch: UpdateBatch, params: Params | None = None) -> Params:
    """`loss_gradient` of the subject's loss."""
    config = subject.task.config
    limit = config.sampling.max_completion_length
    params = subject.params if params is None else params
    return loss_gradient(subject.model, config.loss, limit, params, batch)


@functools.cache
def compiled(rule: OptimConfig) -> optax.GradientTransformation:
    """The optimizer with a jitted update."""
    optimizer = make_optimizer(rule)
    return optax.GradientTransformation(optimizer.init, jax.jit(optimizer.update))


def direction(
    optim: OptimConfig, params: Params, gradients: Iterable[Params]
) -> tuple[Params, optax.OptState]:
    """−P m after the optimizer has seen these gradients one after another, and its state.

    Times a learning rate it is the update that the last of them makes: Adam with moments that have
    lived for as many steps. `params` matter to weight decay alone.
    """
    optimizer = compiled(optim.rule)
    state = optimizer.init(params)
    for one in gradients:
        found, state = optimizer.update(one, state, params)
    return jax.tree.map(jnp.negative, found), state
