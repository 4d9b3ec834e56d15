"""Whose kernel it is: a model of a directory or of a run's checkpoint, and the metric."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdyn import kernels
from jaxdyn.commands.text_options import TextOptions
from jaxdyn.data import Tokenizer
from jaxdyn.distributed import Layout, make_mesh, require_divisible, shard_model
from jaxdyn.models import LanguageModel, local_directory, pretrained_config
from jaxdyn.optim import multiplied
from jaxdyn.sections import MeshConfig, ModelSource
from jaxdyn.train.saved import open_run, require_policy
from jaxdyn.train.task import open_model
from jaxdyn.types import JaxdynError, Params


class Subject(NamedTuple):
    """Whose kernel it is."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    preconditioner: Params | None
    name: str
    step: int | None


def open_subject(options: TextOptions) -> Subject:
    """The model of a directory, or of a run's checkpoint with Adam's metric if asked for.

    A run's adapters are merged, so that the kernel is of all parameters, but in Adam's metric
    they stay: the kernel is then of what the run moves.
    """
    preconditioner, step = None, None
    if options.run is None:
        source, size = ModelSource(str(options.model), options.untie), options.fsdp * options.tensor
        if size > 1:
            layout = Layout(make_mesh(MeshConfig(1, options.fsdp, options.tensor, devices=size)))
            shape = pretrained_config(local_directory(source.path))
            require_divisible(layout.mesh, shape, options.fsdp, "rows")
            model, params, tokenizer = open_model(source, layout)
            model, params = shard_model(model, layout.mesh), layout.place(params)
        else:
            model, params, tokenizer = open_model(source)
        name = Path(str(options.model)).resolve().name
    else:
        with open_run(options.run) as run:
            require_policy(run)
            step = run.find(options.step)
            # Adam's metric is that of the adapters themselves.
            model, params = run.policy(step, merged=not options.preconditioned)
            tokenizer, optim = run.loaded.tokenizer, run.config.optim
            name = f"{run.path.resolve().name}, step {step}"
            if options.preconditioned:
                if optim.optimizer != "adamw":
                    raise JaxdynError(
                        f"--preconditioned takes Adam's second moments; {run.path} was trained "
                        f"with {optim.optimizer}"
                    )
                adam = kernels.adam_preconditioner(
                    run.state(step).opt_state, params, b2=optim.b2, eps=optim.eps
                )
                preconditioner = multiplied(optim, adam)
    dtype = jnp.dtype(options.dtype).type
    if options.dtype == "float64":
        widen = lambda x: x.astype(dtype)
        params, preconditioner = jax.tree.map(widen, (params, preconditioner))
    model = dataclasses.replace(model, dtype=dtype)
    return Subject(model, params, tokenizer, preconditioner, name, step)
