"""Supervised fine-tuning on the `completion` column: where RL starts from.

loss = − mean over completion tokens of log π(y_t | prompt, y_<t),   the stop token included
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdyn.config import SFTConfig
from jaxdyn.data import batch_indices, encode_supervised
from jaxdyn.errors import Preempted
from jaxdyn.hosts import fetch
from jaxdyn.models import save_pretrained
from jaxdyn.paths import AnyPath, open_path, require_writable
from jaxdyn.rl import feature_statistics
from jaxdyn.train.checkpoint import Checkpoints, require_finite
from jaxdyn.train.evaluate import sample_held_out
from jaxdyn.train.preemption import Preemption
from jaxdyn.train.progress import Progress
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.task import Task, open_task
from jaxdyn.train.update import TrainState
from jaxdyn.types import JaxdynError, Model, Params


def make_optimizer(config: SFTConfig) -> optax.GradientTransformation:
    """AdamW under a global-norm clip, with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, max(config.steps, config.warmup_steps + 1)
    )
    clip = optax.clip_by_global_norm(config.max_grad_norm or jnp.inf)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=config.weight_decay))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def sft_update(
    state: TrainState,
    tokens: jax.Array,
    mask: jax.Array,
    completion_mask: jax.Array,
    *,
    model: Model,
    config: SFTConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One supervised update. `completion_mask` marks the tokens to predict."""

    def loss_of(params):
        view = model.view(params)
        features = model.features(view["backbone"], tokens, mask)[:, :-1]
        classifier = view["classifier"]
        statistics = feature_statistics(
            model.logits, classifier, features, tokens[:, 1:], shards=model.shards
        )
        wanted = completion_mask[:, 1:]
        return -jnp.sum(jnp.where(wanted, statistics.logps, 0)) / jnp.sum(wanted)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = make_optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(params, opt_state), metrics


def run_sft(config: SFTConfig, progress: Progress | None = None) -> AnyPath:
    """Run, or resume, supervised training; leave the model in `OUTPUT/model` and return that.

    Raises:
      JaxdynError: for what the user can mend, and when the loss stops being finite.
      Preempted: after SIGTERM, once the step in progress is saved.
    """
    require_writable(open_path(config.output))
    task = open_task(config, config.max_prompt_length)
    completions_of(task.train[:1])
    with (
        RunDirectory(config.output, config, writes=jax.process_index() == 0) as directory,
        Checkpoints(directory.checkpoints, keep=2) as checkpoints,
    ):
        params = fetch(train(task, config, directory, checkpoints, progress or Progress()))
        if jax.process_index() == 0:
            model = directory.local / "model"
            save_pretrained(model, task.model, params, stop_ids=task.tokenizer.stop_ids)
            task.tokenizer.save(model)
    return directory.path / "model"


def train(
    task: Task,
    config: SFTConfig,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    progress: Progress,
) -> Params:
    """The loop, from the newest checkpoint or the start; returns the trained parameters."""
    params = jax.tree.map(jnp.copy, task.params)
    state = task.layout.place(TrainState(params, make_optimizer(config).init(params)))
    position: dict[str, Any] = {"step": 0, "wall": 0.0, "reached": False}
    if saved := checkpoints.steps():
        position = checkpoints.position(saved[-1])
        state = checkpoints.state(saved[-1], state)
    directory.rewind(position["step"])

    reward = float("nan")
    title = f"{directory.path.name} · supervised"
    begin = position["step"]
    with progress.start(title, config.steps, begin), Preemption() as preemption:
        for step in range(begin, config.steps):
            if position["reached"]:
                break
            began = time.perf_counter()
            indices = batch_indices(config.seed, step, config.batch_size, len(task.train))
            examples = [task.train[int(i)] for i in indices]
            arrays = encode_supervised(
                task.tokenizer,
                [e["prompt"] for e in examples],
                completions_of(examples),
                task.model.config.max_positions,
            )
            rows = task.layout.rows(arrays)
            state, metrics = sft_update(state, *rows, model=task.model, config=config)
            metrics = {k: float(v) for k, v in fetch(metrics).items()}
            require_finite(metrics, step, checkpoints)
            position["wall"] += time.perf_counter() - began
            last = step + 1 == config.steps
            if last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0):
                _, evaluated = sample_held_out(task, task.model.view(state.params), config)
                reward = evaluated["reward"]
                metrics |= {f"eval_{k}": v for k, v in evaluated.items()}
                position["reached"] = bool(config.target_reward and reward >= config.target_reward)
            line = {"step": step, **metrics, "time/wall": position["wall"]}
            directory.log("metrics.jsonl", line)
            ends = last or position["reached"]
            preempted = not ends and preemption.reached()
            if ends or preempted or (step + 1) % config.checkpoint_every == 0:
                position["step"] = step + 1
                directory.publish()
                checkpoints.save(step + 1, state, position)
            progress.advance(loss=metrics["loss"], reward=reward)
            if preempted:
                checkpoints.wait()
                raise Preempted(f"preempted; {step + 1} steps are in {directory.path}")
    return state.params


def completions_of(examples: Sequence[dict[str, Any]]) -> list[str]:
    """The examples' completions; JaxdynError, showing its prompt, for one without."""
    for example in examples:
        if not isinstance(example.get("completion"), str):
            raise JaxdynError(
                "supervised training needs a text under 'completion' in every example, and the "
                f"one with the prompt {example['prompt'][:60]!r} has none"
            )
    return [example["completion"] for example in examples]
