"""`jaxdyn plan`: what a run would need and take on devices that need not be there.

Compiles the run's own programs for a TPU slice, GPUs or this machine's devices, from shapes alone,
and prints what each asks of a chip. Times are those of a roofline: no run is faster, and a good one
takes about twice as long.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jaxdyn.commands.output import refuse_another
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.config import RunConfig
from jaxdyn.files import write_file
from jaxdyn.models import ModelConfig, SequenceHead
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.demand import Demand, Program, demand_of
from jaxdyn.plan.figures import figures
from jaxdyn.plan.meshes import Way, candidates, largest_batch
from jaxdyn.plan.programs import Setting
from jaxdyn.plan.tables import show
from jaxdyn.plan.topologies import open_topology
from jaxdyn.presets import preset
from jaxdyn.rewards import LearnedReward, RewardConfig
from jaxdyn.rl import LossConfig
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import ModelSource, TrainConfig
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
    total = (3 + scores) * len(meshes) + 6 - shape.tied + 4 * (room is not None)
    with (progress := Progress()).start(f"compiling for {topology.name}", total):

        def compile_(program: Program) -> Demand:
            demand = demand_of(program, topology.hosts, topology.options)
            progress.advance()
            return demand

        ways = []
        for setting in (Setting(shape, config, mesh, scorer) for mesh in meshes):
            programs = [setting.prefill(), setting.decode(), setting.update("joint")]
            programs += [setting.reward()] if scores else []
            ways.append(Way(setting, {program.name: compile_(program) for program in programs}))
        ways.sort(key=lambda way: (not way.fits(chip), way.step_seconds(chip)))
        best = ways[0]
        demands = {
            program.name: best.demands.get(program.name) or compile_(program)
            for program in best.setting.programs()
        }
        most = None if room is None else largest_batch(best.setting, demands, room, compile_)

    found = figures(options.preset, topology, ways, demands, most)
    show(found)
    if options.json:
        write_file(Path(options.json), json.dumps(found, indent=1) + "\n")
    return found


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
