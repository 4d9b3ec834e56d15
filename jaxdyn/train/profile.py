"""A profiler's trace of chosen steps: where their time goes, on the host and on the devices.

A step's trace is RUN/profile/step_000010, from its beginning to that of the next. On the host's
line are the loop's parts as they are called (rollout, reward, reference, update, probe, ledger,
evaluation); a device's operations carry the scope of the program they belong to in their names
(jit(take_update)/update/...). What Python itself calls is left out: it would be most of the file.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jax

from jaxdyn.types import JaxdynError


def profiled(steps: Iterable[int], chosen: Collection[int], directory: Path) -> Iterator[int]:
    """The steps one after another; while one of the chosen is in work, it is traced.

    The first process traces its own host and devices. A step that a resumed run takes again
    replaces its trace.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    for step in steps:
        if step not in chosen or jax.process_index() > 0:
            yield step
            continue
        where = directory / f"step_{step:06d}"
        shutil.rmtree(where, ignore_errors=True)
        with (
            jax.profiler.trace(str(where), profiler_options=options),
            jax.profiler.StepTraceAnnotation("step", step_num=step),
        ):
            yield step


def require_steps(chosen: Collection[int], count: int) -> None:
    """JaxdynError for a step to profile that a run of so many steps does not have."""
    if beyond := [step for step in chosen if step >= count]:
        raise JaxdynError(
            f"profile must name steps of the run, 0 to {count - 1}, got {min(beyond)}"
        )
