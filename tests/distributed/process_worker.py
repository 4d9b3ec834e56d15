"""One process of a `jaxdyn` command that computes in float64: `process_worker.py COMMAND …`."""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxdyn.cli import main
from jaxdyn.train import task

jax.config.update("jax_enable_x64", True)


def wide(source, opened=task.open_model):
    model, params, tokenizer = opened(source)
    model = dataclasses.replace(model, dtype=jnp.float64)
    return model, jax.tree.map(lambda x: x.astype(jnp.float64), params), tokenizer


def waiting() -> None:
    """Meet the others, again and again; a file says that they have met."""
    from jax.experimental import multihost_utils

    from jaxdyn.distributed.processes import start_processes

    number = start_processes()
    while True:
        multihost_utils.process_allgather(jnp.zeros(1))
        open(f"{sys.argv[2]}/met{number}", "w").close()


if __name__ == "__main__":
    task.open_model = wide
    if sys.argv[1] == "waiting":
        waiting()
    else:
        main(sys.argv[1:])
