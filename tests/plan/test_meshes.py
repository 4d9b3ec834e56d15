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
    "room, slope, prompts, asked",
    [
        (1000 + 100 * 40, 50, 40, False),  # the update's line binds: 1000 + 100 a prompt
        (1000 + 100 * 40 - 1, 50, 36, False),  # a byte less, and each of four parts has one fewer
        (1000 + 100 * 4, 50, 4, False),
        (1000, 50, 0, False),
        # The rollout's is 600 + slope a prompt, of which 500 are known to stay: at forty prompts it
        # is 1000 + 40 slope at most, and where that is too much its own line has to tell.
        (1000 + 100 * 40, 100, 40, False),
        (1000 + 100 * 40, 101, 40, True),
        (1000 + 100 * 40, 112, 36, True),
    ],
)
def test_the_largest_batch_of_two_lines(room, slope, prompts, asked):
    mesh = make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4])
    setting = Setting(TINY, planned_run(PlanOptions("tiny", num_prompts=8)), mesh)

    def demand(name, prompts):
        if name == "stage 2":
            return Demand(name, {}, 0, 0, 1000 + 100 * prompts)
        roles = {"parameters": 400, "reference": 100, "cache": 10 * prompts}
        return Demand(name, roles, 0, 0, 600 + slope * prompts)

    # at four prompts: those at eight are there
    others = other_batches(setting)
    assert [(n, other.run.train.num_prompts) for n, other in others.items()] == [(4, 4)]
    given = {name: demand(name, 8) for name in ("rollout", "stage 2")}
    updates, rollouts = ({n: demand(name, n) for n in others} for name in ("stage 2", "rollout"))
    calls = []
    found = largest_batch(setting, given, room, updates, lambda: calls.append(1) or rollouts)
    assert found == {"num_prompts": prompts, "sequences": 8 * prompts}
    assert bool(calls) == asked


def test_the_options_have_a_runs_defaults():
    run = planned_run(PlanOptions("tiny"))
    own = dataclasses.replace(type(run)(), model=run.model, loss=run.loss, reward=run.reward)
    assert run == own and run.model.remat == type(run)().model.remat
