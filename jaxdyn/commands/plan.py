"""`jaxdyn plan`: what a run would need and take on devices that need not be there.

Compiles the run's own programs for a TPU slice, GPUs or this machine's devices, from shapes alone,
and prints what each asks of a chip. Times are those of a roofline: no run is faster, and a good one
takes about twice as long.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxdyn.commands.output import refuse_another
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.config import RunConfig
from jaxdyn.models import ModelConfig, SequenceHead
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.demand import Demand, Program, demand_of
from jaxdyn.plan.figures import figures
from jaxdyn.plan.meshes import Way, candidates, largest_batch, other_batches
from jaxdyn.plan.programs import Setting
from jaxdyn.plan.tables import show
from jaxdyn.plan.topologies import Topology, open_topology
from jaxdyn.presets import preset
from jaxdyn.rewards import LearnedReward, RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import ModelSource, TrainConfig
from jaxdyn.storage.files import write_file
from jaxdyn.train import Progress


def run(options: PlanOptions) -> dict[str, Any]:
    """Plan, print the tables, and return the figures (those of `--json`).

    Raises:
      JaxdynError: for an unknown preset or topology, a mesh that does not divide the devices, the
        heads or the batch, before anything is compiled.
    """
    if options.json:
        refuse_another(Path(options.json), "plan", lambda known: known >= OWN)
    shape, config = preset(SHAPES, options.preset), planned_run(options)
    if options.untie:
        shape = dataclasses.replace(shape, tied=False)
    scorer = None if options.reward_model is None else scoring_shape(options.reward_model)
    if options.topology != "here":
        jax.config.update("jax_platforms", "cpu")  # the devices are not here; ours are not asked
        jax.config.update("jax_enable_compilation_cache", False)  # nor can it read programs again
    topology = open_topology(options.topology)
    chip = topology.chip
    shapes = [shape] if scorer is None else [shape, scorer]
    meshes = candidates(options.mesh, shapes, topology, options.num_prompts, options.meshes)
    room = None if chip is None or not options.largest else chip.hbm
    scores = scorer is not None
    settings = [Setting(shape, config, mesh, scorer) for mesh in meshes]
    more = 0 if room is None else 2 * len(other_batches(settings[0]))
    total = (3 + scores) * len(meshes) + 6 - shape.tied + more
    with (progress := Progress()).start(f"compiling for {topology.name}", total):
        compile_ = functools.partial(compile_all, topology=topology, progress=progress)
        stepped = compile_([setting.step() for setting in settings])
        ways = [Way(*way) for way in zip(settings, map(by_name, stepped), strict=True)]
        ways.sort(key=lambda way: (not way.fits(chip), way.step_seconds(chip)))
        best = ways[0]
        programs = best.setting.programs()
        left = [program for program in programs if program.name not in best.demands]
        larger = {} if room is None else other_batches(best.setting)
        # The longest compilation first: no core waits for it at the end.
        updates, own = compile_([[other.update("joint") for other in larger.values()], left])
        known = best.demands | by_name(own)
        demands = {program.name: known[program.name] for program in programs}

        def rollouts() -> dict[int, Demand]:
            (found,) = compile_([[other.rollout() for other in larger.values()]])
            return dict(zip(larger, found, strict=True))

        most = None
        if room is not None:
            of_updates = dict(zip(larger, updates, strict=True))
            most = largest_batch(best.setting, demands, room, of_updates, rollouts)

    found = figures(options.preset, topology, ways, demands, most)
    show(found)
    if options.json:
        write_file(Path(options.json), json.dumps(found, indent=1) + "\n")
    return found


AT_ONCE = 4
"""Compilations at a time, at most: each takes a few GiB of this machine's memory at 8B parameters,
and keeps about one and a half cores busy."""


def compile_all(
    groups: Iterable[Sequence[Program]], topology: Topology, progress: Progress
) -> list[list[Demand]]:
    """What each program asks of a device, by group; several are compiled at a time."""

    def finished(demands: Iterable[Demand]) -> Iterator[Demand]:
        for demand in demands:
            progress.advance()
            yield demand

    compile_ = functools.partial(demand_of, hosts=topology.hosts, options=topology.options)
    groups = list(groups)
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        found = finished(pool.map(compile_, itertools.chain(*groups)))
        return [list(itertools.islice(found, len(group))) for group in groups]


def by_name(demands: Iterable[Demand]) -> dict[str, Demand]:
    return {demand.name: demand for demand in demands}


OWN = {"preset", "topology", "programs"}
"""What a plan's JSON has."""


def scoring_shape(name: str) -> ModelConfig:
    """The shape of a reward model: one by that name, or a language model's with a head."""
    shape = preset(SHAPES, name)
    return dataclasses.replace(shape, tied=False, head=shape.head or SequenceHead())


def planned_run(options: PlanOptions) -> RunConfig:
    """The run that is planned: of the options' batch, computing in bfloat16, with a reference."""
    return RunConfig(
        loss=LossConfig(beta=0.04),
        model=ModelSource(dtype="bfloat16", remat=options.remat),
        reward=RewardConfig(model=LearnedReward(dtype=options.reward_dtype)),
        sampling=SamplingConfig(max_completion_length=options.max_completion_length),
        train=TrainConfig(
            num_prompts=options.num_prompts,
            num_generations=options.num_generations,
            microbatches=options.microbatches,
            max_prompt_length=options.max_prompt_length,
        ),
    )
