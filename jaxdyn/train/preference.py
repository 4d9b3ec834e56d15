"""One step of a reward model on preferences, and what it is worth on held-out ones.

loss = − mean over pairs of log σ(r(chosen) − r(rejected))

the model of Bradley and Terry, as of every reward model of its kind (Ouyang et al. 2022, arXiv
2203.02155, equation 1).
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.data import bucket, conversation_ids
from jaxdyn.data.batching import cut_left
from jaxdyn.dynamics.calibration import preference_measures, reliability
from jaxdyn.hosts import fetch
from jaxdyn.models import read_by, sequence_scores
from jaxdyn.optim import OptimConfig, Stage, merge
from jaxdyn.train.experience import examples_of
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.train.scorer import score_rows
from jaxdyn.train.state import TrainState
from jaxdyn.train.step import Taken, progress_of, rate_of, split_state
from jaxdyn.train.task import Task
from jaxdyn.train.update import Metrics, descend
from jaxdyn.types import Model, Params


@functools.partial(
    jax.jit, static_argnames=("model", "optim", "microbatches"), donate_argnames="state"
)
@jax.named_scope("update")
def preference_update(
    state: TrainState,
    frozen: Params,
    pairs: tuple[jax.Array, jax.Array],
    learning_rate: jax.Array,
    *,
    model: Model,
    optim: OptimConfig,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of the parameters in `state` by P pairs; see `descend`.

    Args:
      pairs: tokens and their mask, each [P, 2, T], the chosen sequence first.
    """
    count = len(pairs[0])

    def objective(view, part):
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in part)
        scores = sequence_scores(model, view, tokens, mask)[:, 0].reshape(-1, 2)
        margins = scores[:, 0] - scores[:, 1]
        loss = -jnp.sum(jax.nn.log_sigmoid(margins)) / count
        mean = lambda x: jnp.sum(x) / count
        metrics = {
            "loss": loss,
            "accuracy": mean((1 + jnp.sign(margins)) / 2),
            "margin": mean(margins),
            "scores/chosen": mean(scores[:, 0]),
            "scores/rejected": mean(scores[:, 1]),
        }
        return loss, jax.tree.map(jax.lax.stop_gradient, metrics)

    return descend(
        state,
        frozen,
        objective,
        pairs,
        learning_rate,
        model=model,
        optim=optim,
        microbatches=microbatches,
    )


def take_preference_step(task: Task, state: TrainState, stage: Stage, step: int) -> Taken:
    """Learn a batch of pairs. `state`'s buffers are donated."""
    config = task.config
    began = time.perf_counter()
    rows, rate = pair_rows(task, examples_of(task, step)), rate_of(task, stage, step)
    pairs = padded(rows, config.train.max_length)
    state, frozen = split_state(task, state, stage)
    with jax.profiler.TraceAnnotation("update"):
        state, measured = preference_update(
            state,
            frozen,
            task.layout.rows(pairs),
            np.float32(rate),
            model=task.model,
            optim=config.optim.rule,
            microbatches=config.train.microbatches,
        )
        measured = fetch(measured)
    metrics = {
        **{name: float(value) for name, value in measured.items()},
        **progress_of(task, stage, step, rate),
        "step_time": time.perf_counter() - began,
    }
    state = state.replace(params=merge(state.params, frozen))
    return Taken(state, metrics, int(np.sum(pairs[1])), [])


def pair_rows(task: Task, examples: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens of the examples' sequences, of each the chosen one and then the rejected one."""
    limit, model = task.config.train.max_length, task.model.config
    texts = [example[name] for example in examples for name in ("chosen", "rejected")]
    rows = [read_by(model, conversation_ids(task.tokenizer, text)) for text in texts]
    return [cut_left(task.tokenizer, row, limit) for row in rows]


def padded(rows: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of P pairs as tokens and mask [P, 2, T], padded on the right to a bucket."""
    slots = bucket(max(map(len, rows)), limit)
    tokens = np.zeros((len(rows), slots), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(slots)[None] < lengths[:, None]
    return tokens.reshape(-1, 2, slots), mask.reshape(-1, 2, slots)


@functools.partial(jax.profiler.annotate_function, name="evaluation")
def evaluate_preferences(
    task: Task, params: Params, directory: RunDirectory, step: int
) -> tuple[None, dict[str, float]]:
    """What the held-out pairs say (`preference_measures`); the bins go into `calibration.jsonl`."""
    rows = pair_rows(task, task.test[: task.config.evaluation.num_prompts])
    size = 2 * task.config.train.num_prompts
    scores = score_rows(task.model, params, task.layout, rows, size).reshape(-1, 2)
    lengths = np.array([len(row) for row in rows]).reshape(-1, 2)
    margins = scores[:, 0] - scores[:, 1]
    bins = [found._asdict() for found in reliability(margins)]
    directory.log("calibration.jsonl", {"step": step, "pairs": len(margins), "bins": bins})
    return None, preference_measures(margins, lengths[:, 0] - lengths[:, 1])
