"""One process of a `jaxdyn` command that computes in float64: `process_worker.py COMMAND …`."""

import dataclasses
import gc
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn.cli import failing_at_once, main


def wide(opened):
    """`open_model`, of a model in float64."""

    def open_wide(*given):
        model, params, tokenizer = opened(*given)
        model = dataclasses.replace(model, dtype=jnp.float64)
        return model, jax.tree.map(lambda x: x.astype(jnp.float64), params), tokenizer

    return open_wide


def meet(directory: str) -> None:
    """Meet the other processes, again and again; a file says that they have met."""
    from jax.experimental import multihost_utils

    from jaxdyn.distributed.processes import start_processes

    number = start_processes()
    while True:
        multihost_utils.process_allgather(jnp.zeros(1))
        Path(directory, f"met{number}").touch()


def problem():
    """A model, its parameters, and sites of random sequences."""
    from jaxdyn.models import LanguageModel, gpt_neox
    from jaxdyn.types import Sites

    model = LanguageModel(
        gpt_neox(20, width=8, num_layers=1, num_heads=2, rotary_fraction=1.0), jnp.float64
    )
    params = jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, 20, (5, 6)).astype(np.int32)
    n = jnp.arange(5, dtype=jnp.int32)
    nowhere = jnp.zeros(5, bool)
    return model, params, Sites(jnp.asarray(tokens), jnp.ones((5, 6), bool), n, n, 2 * n, nowhere)


def kernel(output: str) -> None:
    """Save kernels between sites, and the number of tiles this process made.

    The parameters are every process's own, then divided among all of them.
    """
    from jaxdyn import kernels
    from jaxdyn.distributed import Layout, make_mesh, shard_model
    from jaxdyn.distributed.processes import start_processes
    from jaxdyn.sections import MeshConfig

    number = start_processes()
    jax.config.update("jax_enable_x64", True)
    model, params, sites = problem()
    count = jax.process_count()
    layout = Layout(make_mesh(MeshConfig(tensor=count, fsdp=1, devices=count)))
    options = {"method": "gram", "blocks": Path(output, "blocks")}
    for name, of, where in (
        ("apart", model, params),
        ("again", model, params),  # from the tiles on disk
        ("together", shard_model(model, layout.mesh), layout.place(params)),
    ):
        found = kernels.log_prob_kernel(of, where, sites, **options)
        parts = {part: getattr(found, part) for part in ("representation", "gradient", "cross")}
        np.savez(Path(output, f"{name}-{number}.npz"), allow_pickle=False, **parts)
        options["blocks"] = Path(output, "blocks" if name == "apart" else "others")


if __name__ == "__main__":
    gc.disable()  # for so short a life
    if sys.argv[1] == "meet":
        with failing_at_once():
            meet(sys.argv[2])
    if sys.argv[1] == "kernel":
        kernel(sys.argv[2])
        sys.exit()
    from jaxdyn.train import task

    jax.config.update("jax_enable_x64", True)
    task.open_model = wide(task.open_model)
    main(sys.argv[1:])
