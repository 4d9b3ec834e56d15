"""`jaxdyn plan`: what a run would need and take on devices that need not be there.

Compiles the run's own programs for a TPU slice, or this machine's devices, from shapes alone, and
prints what each asks of a chip. Times are those of a roofline: no run is faster, and a good one
takes about twice as long.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from jaxdyn.config import RunConfig
from jaxdyn.distributed import make_mesh, require_divisible
from jaxdyn.models import ModelConfig
from jaxdyn.plan.chips import Chip, Topology, open_topology
from jaxdyn.plan.demand import Demand, Program, demand_of
from jaxdyn.plan.programs import Setting
from jaxdyn.plan.text import Number
from jaxdyn.presets import SHAPES, preset
from jaxdyn.rollout import SamplingConfig
from jaxdyn.sections import AXES, MeshConfig, ModelSource, TrainConfig
from jaxdyn.train.progress import Progress
from jaxdyn.types import JaxdynError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile a run's programs for a TPU slice or this machine: memory, time and limits per chip.

    Attributes:
      preset: the model's shape: pythia-2.8b, llama-8b or tiny.
      topology: a slice as v5p:4x4x4 or v5e-64, or `here`.
      mesh: how its chips divide the work; when not given, several ways are tried.
      meshes: how many, each by three compilations.
      num_prompts: prompts a step (P).
      num_generations: completions a prompt (G).
      max_prompt_length: longest prompt, in tokens.
      max_completion_length: longest completion, in tokens.
      microbatches: parts of each update's batch.
      remat: what an update keeps of the forward pass (see `jaxdyn rl --help`).
      largest: find the largest batch that fits, by four more compilations.
      json: also write the figures to this file.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    topology: str = "here"
    mesh: MeshConfig = MeshConfig()
    meshes: int = 3
    num_prompts: int = TrainConfig.num_prompts
    num_generations: int = TrainConfig.num_generations
    max_prompt_length: int = TrainConfig.max_prompt_length
    max_completion_length: int = SamplingConfig.max_completion_length
    microbatches: int = TrainConfig.microbatches
    remat: Literal["none", "dots", "full"] = ModelSource.remat
    largest: bool = True
    json: str | None = None

    def __post_init__(self):
        if self.meshes < 1:
            raise JaxdynError(f"meshes must be at least 1, got {self.meshes}")

    @property
    def run(self) -> RunConfig:
        return RunConfig(
            model=ModelSource(dtype="bfloat16", remat=self.remat),
            sampling=SamplingConfig(max_completion_length=self.max_completion_length),
            train=TrainConfig(
                num_prompts=self.num_prompts,
                num_generations=self.num_generations,
                microbatches=self.microbatches,
                max_prompt_length=self.max_prompt_length,
            ),
        )


@dataclasses.dataclass(frozen=True)
class Way:
    """A mesh, and what the programs that make a step ask of each of its devices."""

    setting: Setting
    demands: dict[str, Demand]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.setting.mesh.shape[axis] for axis in AXES)

    def fits(self, chip: Chip | None) -> bool:
        return all(demand.fits(chip) for demand in self.demands.values())

    def step_seconds(self, chip: Chip | None) -> Number:
        """A joint step's: the prompts' pass, as many decoding steps as slots, the update.

        Without a chip's figures a rate of one for all: flops alone.
        """
        time = lambda name: seconds(self.demands[name], chip)
        steps = self.setting.run.sampling.max_completion_length
        return time("prefill") + steps * time("decode") + time("stage 2")


def seconds(demand: Demand, chip: Chip | None) -> Number:
    """The roofline's time; without a chip's figures, the flops."""
    if demand.cost is None:
        return math.inf
    return demand.cost.flops if chip is None else max(demand.seconds(chip).values())


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Plan, print the tables, and return the figures (those of `--json`).

    Raises:
      JaxdynError: for an unknown preset or topology, a mesh that does not divide the devices, the
        heads or the batch, before anything is compiled.
    """
    shape, run = preset(SHAPES, config.preset), config.run
    if config.topology != "here":
        jax.config.update("jax_platforms", "cpu")  # the devices are not here; ours are not asked
        jax.config.update("jax_enable_compilation_cache", False)  # nor can it read programs again
    topology = open_topology(config.topology)
    meshes = candidates(config, shape, topology)
    console, chip = Console(), topology.chip
    if not console.is_terminal:
        console = Console(width=120)
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)

    settings = [Setting(shape, run, mesh) for mesh in meshes]
    total = 3 * len(settings) + 6 + 4 * config.largest
    with (progress := Progress()).start(f"compiling for {topology.name}", total):

        def compile_(program: Program) -> Demand:
            demand = demand_of(program)
            progress.advance()
            return demand

        ways = []
        for setting in settings:
            programs = [setting.prefill(), setting.decode(), setting.update("joint")]
            ways.append(Way(setting, {program.name: compile_(program) for program in programs}))
        ways.sort(key=lambda way: (not way.fits(chip), way.step_seconds(chip)))
        best = ways[0]
        demands = {
            program.name: best.demands.get(program.name) or compile_(program)
            for program in best.setting.programs()
        }
        most = largest_batch(best.setting, demands, chip, compile_) if config.largest else None

    found = figures(config, topology, ways, demands, most)
    say(f"{config.preset} on {topology.name}: {len(topology.devices)} devices, mesh {best.shape}")
    console.print(program_table(list(demands.values()), chip))
    for line in summary(found):
        say(line)
    if len(ways) > 1:
        console.print(mesh_table(ways, chip))
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


# -- meshes and batches ---------------------------------------------------------------------------


def candidates(config: PlanConfig, shape: ModelConfig, topology: Topology) -> list[Mesh]:
    """The mesh that is asked for, or the first of those that divide everything.

    Those come first that divide the sequences' work least, then those that copy least.
    """
    devices = topology.devices[: config.mesh.devices or None]
    if config.mesh.devices > len(topology.devices):
        raise JaxdynError(
            f"mesh.devices is {config.mesh.devices}; {topology.name} has {len(topology.devices)}"
        )
    divide = lambda mesh: require_divisible(mesh, shape, config.num_prompts, "num_prompts")
    if config.mesh != MeshConfig(devices=config.mesh.devices):
        mesh = make_mesh(config.mesh, devices)
        divide(mesh)
        return [mesh]
    found = []
    sizes = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    for tensor, data in itertools.product(sizes, sizes):
        if len(devices) % (tensor * data):
            continue
        mesh = make_mesh(MeshConfig(data, -1, tensor), devices)
        try:
            divide(mesh)
        except JaxdynError as error:
            refused = error
        else:
            found.append(mesh)
    if not found:
        raise JaxdynError(f"no mesh of {len(devices)} devices suits this batch: {refused}")
    return found[: config.meshes]


def largest_batch(
    setting: Setting, demands: dict[str, Demand], chip: Chip | None, compile_: Any
) -> dict[str, Any] | None:
    """The most prompts a step whose rollout and joint update fit, by a linear model of the peak.

    Each is compiled at one and at two prompts for every part of the batch; None without a chip.
    """
    parts = setting.mesh.shape["data"] * setting.mesh.shape["fsdp"]
    if chip is None:
        return None
    most = math.inf
    for name in ("rollout", "stage 2"):
        peaks = []
        for count in (parts, 2 * parts):
            train = dataclasses.replace(setting.run.train, num_prompts=count)
            run = dataclasses.replace(setting.run, train=train)
            other = dataclasses.replace(setting, run=run)
            same = count == setting.run.train.num_prompts
            program = other.rollout() if name == "rollout" else other.update("joint")
            peaks.append((demands[name] if same else compile_(program)).peak)
        slope = max(peaks[1] - peaks[0], 1)
        most = min(most, 1 + (chip.hbm - peaks[0]) / slope)
    prompts = max(0, math.floor(most)) * parts
    return {"num_prompts": prompts, "sequences": prompts * setting.run.train.num_generations}


# -- figures, tables ------------------------------------------------------------------------------


def figures(
    config: PlanConfig,
    topology: Topology,
    ways: list[Way],
    demands: dict[str, Demand],
    most: dict[str, Any] | None,
) -> dict[str, Any]:
    """All of it as plain data; bytes and flops are one device's."""
    chip, run = topology.chip, config.run
    rows = run.train.num_prompts * run.train.num_generations
    found: dict[str, Any] = {
        "preset": config.preset,
        "topology": topology.name,
        "devices": len(topology.devices),
        "chip": None if chip is None else dataclasses.asdict(chip),
        "mesh": dict(zip(AXES, ways[0].shape, strict=True)),
        "batch": {
            "num_prompts": run.train.num_prompts,
            "num_generations": run.train.num_generations,
            "sequences": rows,
            "prompt_slots": run.train.max_prompt_length,
            "completion_slots": run.sampling.max_completion_length,
            "microbatches": run.train.microbatches,
        },
        "programs": {name: plain(demand, chip) for name, demand in demands.items()},
        "largest_batch": most,
        "meshes": [
            {
                "mesh": way.shape,
                "fits": way.fits(chip),
                "peak": max(demand.peak for demand in way.demands.values()),
                "step_seconds": None if chip is None else way.step_seconds(chip),
            }
            for way in ways
        ],
    }
    one, two = demands["stage 1"], demands["stage 2"]
    shares: dict[str, Number | None] = {"own": one.own / two.own, "peak": one.peak / two.peak}
    if one.cost and two.cost:
        shares["flops"] = one.cost.flops / two.cost.flops
        shares["collective_bytes"] = ratio(one.cost.collective_bytes, two.cost.collective_bytes)
    if chip is not None:
        rollout = seconds(demands["rollout"], chip)
        shares["seconds"] = ratio(seconds(one, chip), seconds(two, chip))
        found["rollout_tokens_per_second"] = rows * run.sampling.max_completion_length / rollout
        found["step_seconds"] = {
            "stage 1": rollout + seconds(one, chip),
            "stage 2": rollout + seconds(two, chip),
        }
    return {**found, "stage_1_share": shares}


def ratio(a: Number, b: Number) -> Number | None:
    return a / b if b else None


def plain(demand: Demand, chip: Chip | None) -> dict[str, Any]:
    """A program's figures as plain data."""
    found: dict[str, Any] = {
        "bytes_by_role": demand.roles,
        "temporary": demand.temporary,
        "own": demand.own,
        "peak": demand.peak,
        "fits": demand.fits(chip),
    }
    if demand.cost is None:
        return found
    cost = demand.cost
    by_kind = lambda counts: {f"{kind} of {group}": n for (kind, group), n in counts.items()}
    found |= {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collective_bytes": cost.collective_bytes,
        "collectives": {"sent": by_kind(cost.sent), "arrays": by_kind(cost.moved)},
        "uncounted": dict(cost.uncounted),
    }
    if chip is not None:
        times = demand.seconds(chip)
        found |= {"seconds": times, "limit": max(times, key=lambda name: times[name])}
    return found


def program_table(demands: list[Demand], chip: Chip | None) -> Table:
    """One line a program."""
    table = Table(box=box.SIMPLE_HEAD)
    memory = ("params", "optim", "cache", "temp", "peak", "of HBM")
    for column in ("program", *memory, "Tflop", "GB", "sent", "ms", "limit"):
        left = column in ("program", "limit")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    gib = lambda x: f"{x / GIB:.2f}" if x else ""
    for demand in demands:
        role = lambda *names, demand=demand: gib(sum(demand.roles.get(n, 0) for n in names))
        cells = [demand.name, role("parameters", "reference"), role("optimizer")]
        cells += [role("cache", "factors")]
        cells += [gib(demand.temporary), gib(demand.peak)]
        cells += [f"{demand.peak / chip.hbm:.0%}" if chip else ""]
        if demand.cost is None:
            cells += ["", "", "", "", "does not fit"]
        else:
            cost = demand.cost
            cells += [f"{cost.flops / 1e12:.3g}", f"{cost.bytes / 1e9:.3g}"]
            cells += [f"{cost.collective_bytes / 1e9:.3g}"]
            times = demand.seconds(chip) if chip else {}
            longest = max(times, key=lambda name: times[name]) if chip else ""
            cells += [f"{1e3 * times[longest]:.3g}" if chip else "", longest]
        table.add_row(*cells)
    return table


def mesh_table(ways: list[Way], chip: Chip | None) -> Table:
    """The meshes that were tried, the best first."""
    table = Table(box=box.SIMPLE_HEAD, title="meshes tried")
    for column in (*AXES, "peak GiB", "step ms"):
        table.add_column(column, justify="right")
    for way in ways:
        peak = max(demand.peak for demand in way.demands.values())
        time = way.step_seconds(chip)
        cells = [f"{peak / GIB:.2f}", f"{1e3 * time:.4g}" if chip and way.fits(chip) else ""]
        table.add_row(*map(str, way.shape), *cells)
    return table


def summary(found: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    batch, shares = found["batch"], found["stage_1_share"]
    lines = [
        "per chip: GiB of the policy and the reference, the optimizer, caches (or a kernel's "
        "factors), temporaries, and all that lies there at once; flops; GB read and written, GB "
        "sent",
        f"batch: {batch['num_prompts']} prompts x {batch['num_generations']} completions, "
        f"{batch['prompt_slots']} + {batch['completion_slots']} tokens",
    ]
    if found["largest_batch"]:
        most = found["largest_batch"]
        lines.append(
            f"largest batch that fits: {most['num_prompts']} prompts, {most['sequences']} "
            "sequences (a linear model of the peaks of two batches)"
        )
    if "step_seconds" in found:
        step = found["step_seconds"]
        lines.append(
            f"at the chips' full rates: rollout {found['rollout_tokens_per_second']:,.0f} tokens/s;"
            f" a step {step['stage 1']:.3g} s in stage 1, {step['stage 2']:.3g} s in stage 2"
        )
    parts = [
        f"{shares[key]:.1%} of its {what}"
        for key, what in (("flops", "flops"), ("own", "memory"), ("seconds", "time"))
        if shares.get(key) is not None
    ]
    lines.append(f"stage 1's update against stage 2's: {', '.join(parts)}")
    if names := {name for program in found["programs"].values() for name in program["uncounted"]}:
        lines.append(f"not counted: the work of {', '.join(sorted(names))}")
    return lines
