"""Meshes in their order, and the largest batch by a straight line that is known."""

import dataclasses

import jax
import pytest

from jaxdyn.commands.plan import planned_run
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.distributed import make_mesh
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.demand import Demand
from jaxdyn.plan.meshes import candidates, largest_batch, other_batches
from jaxdyn.plan.programs import Setting
from jaxdyn.plan.topologies import Topology
from jaxdyn.sections import MeshConfig
from jaxdyn.types import JaxdynError

TINY = SHAPES["tiny"]  # 4 heads, width 64


@pytest.mark.parametrize(
    "num_prompts, most, shapes",
    [
        (8, 3, [(1, 8, 1), (2, 4, 1), (4, 2, 1)]),
        (8, 5, [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 4, 2)]),
        # Four prompts leave no part of a batch to eight devices, and a head is not divided.
        (4, 9, [(1, 4, 2), (2, 2, 2), (4, 1, 2), (1, 2, 4), (2, 1, 4)]),
    ],
)
def test_sequences_are_divided_last_and_parameters_copied_least(num_prompts, most, shapes):
    topology = Topology("here", None, jax.devices())
    meshes = candidates(MeshConfig(), [TINY], topology, num_prompts, most)
    assert [mesh.devices.shape for mesh in meshes] == shapes


def test_a_batch_that_suits_no_mesh_is_told_why_the_first_does_not():
    """Of 8 devices and 7 prompts: the prompts, not the heads that a last resort divides."""
    topology = Topology("here", None, jax.devices())
    with pytest.raises(JaxdynError, match=r"8 devices suits this batch: .*num_prompts") as caught:
        candidates(MeshConfig(), [TINY], topology, 7, 3)
    assert "num_heads" not in str(caught.value)


@pytest.mark.parametrize(
    "room, prompts",
    [
        (1000 + 100 * 40, 40),  # the update's line binds: 1000 + 100 a prompt
        (1000 + 100 * 40 - 1, 36),  # one byte less, and each of the four parts has one fewer
        (1000 + 100 * 4, 4),
        (1000, 0),
    ],
)
def test_the_largest_batch_of_two_lines(room, prompts):
    mesh = make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4])
    setting = Setting(TINY, planned_run(PlanOptions("tiny", num_prompts=8)), mesh)

    def demand(name, prompts):
        slope, start = (50, 0) if name == "rollout" else (100, 1000)
        return Demand(name, {}, 0, 0, start + slope * prompts)

    # at four prompts: those at eight are there
    others = [(count, program.name) for count, program in other_batches(setting)]
    assert others == [(4, "stage 2"), (4, "rollout")]
    given = {name: demand(name, 8) for name in ("rollout", "stage 2")}
    found = largest_batch(setting, given, room, [(n, demand(name, n)) for n, name in others])
    assert found == {"num_prompts": prompts, "sequences": 8 * prompts}


def test_the_options_have_a_runs_defaults():
    run = planned_run(PlanOptions("tiny"))
    own = dataclasses.replace(type(run)(), model=run.model, loss=run.loss, reward=run.reward)
    assert run == own and run.model.remat == type(run)().model.remat
