"""Ways to divide a run's work over a slice: meshes that suit it, and the batch one can hold."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from jaxdyn.distributed import make_mesh, require_divisible
from jaxdyn.models import ModelConfig
from jaxdyn.plan.chips import Chip
from jaxdyn.plan.demand import Demand
from jaxdyn.plan.programs import CACHE, Setting
from jaxdyn.plan.text import Number
from jaxdyn.plan.topologies import Topology
from jaxdyn.sections import AXES, MeshConfig
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class Way:
    """A mesh, and what the programs that make a step ask of each of its devices."""

    setting: Setting
    demands: dict[str, Demand]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.setting.mesh.shape[axis] for axis in AXES)

    @property
    def peak(self) -> Number:
        return max(demand.peak for demand in self.demands.values())

    def fits(self, chip: Chip | None) -> bool:
        return all(demand.fits(chip) for demand in self.demands.values())

    def step_seconds(self, chip: Chip | None) -> Number:
        """A joint step's: the prompts' pass, as many decoding steps as slots, scores, the update.

        Without a chip's figures a rate of one for all: flops alone.
        """
        time = lambda name: self.demands[name].least(chip)
        steps = self.setting.run.sampling.max_completion_length
        scores = self.setting.batches * time("reward") if self.setting.scorer else 0
        return time("prefill") + steps * time("decode") + scores + time("stage 2")


def candidates(
    asked: MeshConfig,
    shapes: Sequence[ModelConfig],
    topology: Topology,
    num_prompts: int,
    most: int,
) -> list[Mesh]:
    """The mesh that is asked for, or the first `most` of those that divide everything.

    Those come first that divide the sequences' work least, then those that copy least.

    Raises:
      JaxdynError: if the topology has fewer devices, or what is asked for does not divide them, the
        models or the batch.
    """
    devices = topology.devices[: asked.devices or None]
    if asked.devices > len(topology.devices):
        raise JaxdynError(
            f"mesh.devices is {asked.devices}; {topology.name} has {len(topology.devices)}"
        )

    def divide(mesh: Mesh) -> None:
        for shape in shapes:
            require_divisible(mesh, shape, num_prompts, "num_prompts")

    if asked != MeshConfig(devices=asked.devices):
        mesh = make_mesh(asked, devices)
        divide(mesh)
        return [mesh]
    found: list[Mesh] = []
    refused: list[JaxdynError] = []
    sizes = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    for tensor, data in itertools.product(sizes, sizes):
        if len(devices) % (tensor * data):
            continue
        mesh = make_mesh(MeshConfig(data, -1, tensor), devices)
        try:
            divide(mesh)
            found.append(mesh)
        except JaxdynError as error:
            refused.append(error)
    if not found:
        raise JaxdynError(f"no mesh of {len(devices)} devices suits this batch: {refused[0]}")
    return found[:most]


def other_batches(setting: Setting) -> dict[int, Setting]:
    """The same at one and at two prompts for every part of the batch, by prompts.

    The setting's own number of prompts is left out.
    """
    parts, own = batch_parts(setting), setting.run.train
    change = dataclasses.replace
    runs = {n: change(setting.run, train=change(own, num_prompts=n)) for n in (parts, 2 * parts)}
    return {n: change(setting, run=run) for n, run in runs.items() if n != own.num_prompts}


def batch_parts(setting: Setting) -> int:
    """The devices that a batch is divided between."""
    return setting.mesh.shape["data"] * setting.mesh.shape["fsdp"]


def largest_batch(
    setting: Setting,
    demands: dict[str, Demand],
    room: Number,
    updates: dict[int, Demand],
    rollouts: Callable[[], dict[int, Demand]],
) -> dict[str, int]:
    """The most prompts a step whose rollout and joint update fit `room` bytes, if peaks are linear.

    Args:
      demands: of the setting's own programs, by name.
      updates: of the joint update at the prompts of `other_batches`.
      rollouts: compiles the rollout at these; asked only where its own peak leaves it open whether
        as many prompts fit as the update can hold.
    """
    parts, own = batch_parts(setting), setting.run.train.num_prompts

    def most(name: str, others: dict[int, Demand]) -> int:
        peaks = {own: demands[name].peak} | {count: other.peak for count, other in others.items()}
        slope = max(peaks[2 * parts] - peaks[parts], 1) / parts
        return max(0, math.floor((parts + (room - peaks[parts]) / slope) / parts)) * parts

    prompts = most("stage 2", updates)
    drawn = demands["rollout"]
    # What does not grow with the batch is no less than what lies there without one.
    still = sum(x for role, x in drawn.roles.items() if role != CACHE)
    if still + (drawn.peak - still) * max(1, prompts / own) > room:
        prompts = min(prompts, most("rollout", rollouts()))
    return {"num_prompts": prompts, "sequences": prompts * setting.run.train.num_generations}
