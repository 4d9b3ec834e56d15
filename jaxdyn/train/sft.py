"""One supervised step on the `completion` column: what RL starts from.

loss = − mean over completion tokens of log π(y_t | prompt, y_<t),   the stop token included
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.config import SFTConfig
from jaxdyn.data import encode_supervised, pack
from jaxdyn.hosts import fetch
from jaxdyn.optim import OptimConfig, Stage, merge
from jaxdyn.train.experience import examples_of
from jaxdyn.train.policy import completion_statistics
from jaxdyn.train.state import TrainState
from jaxdyn.train.step import Taken, progress_of, rate_of, split_state
from jaxdyn.train.task import Task
from jaxdyn.train.update import Metrics, descend
from jaxdyn.types import JaxdynError, Mask, Model, Params

Encoded = tuple[jax.Array, Mask, jax.Array]
"""Tokens [B, T], their mask, and which are to be predicted [B, T]."""


@functools.partial(
    jax.jit, static_argnames=("model", "optim", "microbatches"), donate_argnames="state"
)
@jax.named_scope("update")
def supervised_update(
    state: TrainState,
    frozen: Params,
    encoded: Encoded,
    learning_rate: jax.Array,
    *,
    model: Model,
    optim: OptimConfig,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One supervised update of the parameters in `state`; see `descend`."""
    count = jnp.sum(encoded[2][:, 1:])

    def objective(view, part):
        tokens, mask, predicted = part
        features = model.features(view["backbone"], tokens, mask)[:, :-1]
        statistics = completion_statistics(model, view["classifier"], features, tokens[:, 1:], 1.0)
        loss = -jnp.sum(jnp.where(predicted[:, 1:], statistics.logps, 0)) / count
        return loss, {"loss": jax.lax.stop_gradient(loss)}

    return descend(
        state,
        frozen,
        objective,
        encoded,
        learning_rate,
        model=model,
        optim=optim,
        microbatches=microbatches,
    )


def take_supervised_step(
    task: Task[SFTConfig], state: TrainState, stage: Stage, step: int
) -> Taken:
    """Learn a batch of completions. `state`'s buffers are donated."""
    config = task.config
    began = time.perf_counter()
    examples, rate = examples_of(task, step), rate_of(task, stage, step)
    encoded = encode_supervised(
        task.tokenizer,
        [e["prompt"] for e in examples],
        completions_of(examples),
        task.model.config.max_positions,
        config.train.max_prompt_length if task.cuts else None,
    )
    if config.train.packing:
        encoded = pack(*encoded, config.train.microbatches * task.model.row_shards)
    state, frozen = split_state(task, state, stage)
    with jax.profiler.TraceAnnotation("update"):
        state, measured = supervised_update(
            state,
            frozen,
            task.layout.rows(encoded),
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
    return Taken(state, metrics, int(np.count_nonzero(encoded[1])), [])


def completions_of(examples: Sequence[dict[str, Any]]) -> list[str]:
    """The examples' completions; JaxdynError, showing its prompt, for one without."""
    for example in examples:
        if not isinstance(example.get("completion"), str):
            raise JaxdynError(
                "supervised training needs a text under 'completion' in every example, and the "
                f"one with the prompt {example['prompt'][:60]!r} has none"
            )
    return [example["completion"] for example in examples]
