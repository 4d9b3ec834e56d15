"""A plan for a TPU slice against the same programs counted for this machine's devices, and by hand.

libtpu stays in a process of its own.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import jax
import plans
import pytest

from jaxdyn.commands.plan import planned_run, scoring_shape
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.distributed import make_mesh
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.chips import CHIPS
from jaxdyn.plan.demand import Demand, demand_of, exhausted
from jaxdyn.plan.figures import excess
from jaxdyn.plan.hlo import Cost
from jaxdyn.plan.meshes import Way
from jaxdyn.plan.programs import Setting
from jaxdyn.sections import MeshConfig

ROWS, PROMPT, COMPLETION = (4, 2), 16, 16
OPTIONS = {
    "num_prompts": ROWS[0],
    "num_generations": ROWS[1],
    "max_prompt_length": PROMPT,
    "max_completion_length": COMPLETION,
}
TINY = SHAPES["tiny"]


def setting(data, fsdp, tensor):
    mesh = make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])
    return Setting(TINY, planned_run(PlanOptions("tiny", **OPTIONS)), mesh)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """`jaxdyn plan tiny` for a v5e slice of four: what it printed, and its figures."""
    pytest.importorskip("libtpu")
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    command = [sys.executable, "-m", "jaxdyn.cli", "plan", "tiny", "--topology", "v5e-4"]
    command += ["--mesh.data", "2", "--mesh.fsdp", "2", "--no-largest", "--json", str(path)]
    for name, value in OPTIONS.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    # One device here, and no cache: what CI has.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def parameters() -> int:
    """By hand: two layers of query, key, value, out, up and down with biases, and norms."""
    width, vocab = TINY.width, TINY.vocab_size
    layer = 12 * width**2 + (4 + 4 + 1) * width + 2 * 2 * width
    return TINY.num_layers * layer + 2 * width + 2 * vocab * width


def test_arguments_by_role_are_the_shares_of_parameters_moments_and_caches():
    one, four = setting(1, 1, 1), setting(1, 2, 2)
    stored = 4 * parameters()
    demand = lambda program: {name: share(tree) for name, tree in program.roles.items()}
    share = lambda tree: sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
    whole = demand(one.update("joint"))
    assert whole["parameters"] == stored
    counts = 2 * 4  # an Adam step count for each of the two halves
    assert whole["optimizer"] == 2 * stored + counts
    # Norms and biases are copied in whole, all but those of divided outputs.
    divided = demand(four.update("joint"))["parameters"]
    assert stored / 4 < divided < stored / 4 + 4 * TINY.num_layers * 10 * TINY.width
    cache = TINY.num_layers * 2 * TINY.num_heads * TINY.head_dim * 2  # keys and values, bfloat16
    slots = ROWS[0] * PROMPT + ROWS[0] * ROWS[1] * COMPLETION
    assert demand(four.decode())["cache"] == cache * slots / 4


def test_a_reward_model_lies_beside_the_policy_and_scores():
    options = PlanOptions("tiny", **OPTIONS, reward_model="tiny", reward_dtype="float32")
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    ours = Setting(TINY, planned_run(options), mesh, scoring_shape("tiny"))
    # The same body, and one row in the place of a vocabulary's.
    size = 4 * (parameters() - (TINY.vocab_size - 1) * TINY.width)
    demand = demand_of(ours.reward())
    assert demand.roles["reward model"] == size
    assert demand.roles["parameters"] + demand.roles["reference"] >= 4 * parameters()
    tokens, width = ROWS[0] * ROWS[1] * (PROMPT + COMPLETION), TINY.width
    attention = 2 * 2 * (PROMPT + COMPLETION) * width
    body = TINY.num_layers * tokens * (2 * 12 * width**2 + attention)
    assert demand.cost.flops == body + 2 * ROWS[0] * ROWS[1] * width
    programs = [p for p in ours.programs() if p.name not in ("factors", "kernel")]
    assert [p.name for p in programs][:4] == ["rollout", "prefill", "decode", "reward"]
    for program in programs:
        assert "reward model" in {**program.roles, **program.held}, program.name


@pytest.mark.slow
def test_a_slices_programs_do_the_work_of_ours(plan):
    """Each of four chips does a quarter of the products of one device."""
    programs = plan[1]["programs"]
    ours = setting(1, 1, 1)
    for program in (ours.prefill(), ours.update("classifier")):
        cost = demand_of(program).cost
        assert programs[program.name]["flops"] == cost.flops / 4
    # The classifier's gradient: its logits, and the products back to W.
    rows = ROWS[0] * ROWS[1] * COMPLETION
    assert programs["stage 1"]["flops"] == 2 * 2 * rows * TINY.vocab_size * TINY.width / 4


@pytest.mark.slow
def test_a_plan_has_every_program_and_its_limit(plan):
    text, found = plan
    names = ["rollout", "prefill", "decode", "reference", "stage 1", "stage 2"]
    assert list(found["programs"]) == [*names, "propagation", "factors", "kernel"]
    assert found["topology"] == "v5e:2x2" and found["devices"] == 4
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    for name, program in found["programs"].items():
        assert f"\n  {name} " in text
        times = program["seconds"]
        assert program["limit"] == max(times, key=times.get) and program["fits"]
        assert times["compute"] == program["flops"] / CHIPS["v5e"].flops
        assert times["memory"] == program["bytes"] / CHIPS["v5e"].bandwidth
        held = sum(program["bytes_by_role"].values())
        assert program["peak"] >= held > 0
    # What a decoding step reads at least: parameters and caches; and a rollout is sixteen of them
    # but the first, whose token comes from the prompts' pass.
    decode, rollout = found["programs"]["decode"], found["programs"]["rollout"]
    products = found["programs"]["prefill"]["flops"] + 15 * decode["flops"]
    assert rollout["flops"] == pytest.approx(products, rel=0.15)
    assert 0 < found["stage_1_share"]["flops"] < 1
    assert "stage 1's update against stage 2's" in text


def test_the_benchmark_of_plans_writes_it_down(plan, monkeypatch, tmp_path):
    figures = {**plan[1], "largest_batch": {"num_prompts": 6}}
    monkeypatch.setattr(plans, "plan", lambda preset, topology: figures)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as the command sets it
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    command = ["plans.py", "plans", "--cases", "tiny v5e-4", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    plans.main()
    written = json.loads((tmp_path / "plans.json").read_text())
    assert written["plans"] == {"tiny v5e-4": figures}
    assert [row["chips"] for row in written["memory"]] == ["h200 (1)"] * 2
    page = (tmp_path / "plans.md").read_text().splitlines()
    assert "## tiny on v5e:2x2 (4 chips, data 2 x fsdp 2 x tensor 1)" in page
    assert any(line.endswith("Largest batch: 6 prompts.") for line in page)
    rows = [line.split(" | ")[0] for line in page if line.startswith("| ")]
    assert rows[1 : 1 + len(figures["programs"])] == [f"| {name}" for name in figures["programs"]]


def test_a_program_that_was_refused_says_what_it_needed():
    one = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm."
    two = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (28.12G) exceeds available HBM (15.75G)."
    )
    assert exhausted(one, 10) == 20.5 * 2**30
    assert exhausted(two, 2**30) == 29.12 * 2**30
    assert exhausted("RESOURCE_EXHAUSTED", 10) == float("inf")


def test_the_longest_of_three_times_binds():
    chip = CHIPS["v5e"]
    cost = Cost(flops=197e9, bytes=819e6 * 3, sent=Counter({("all-reduce", 4): 200e6 * 2}))
    demand = Demand("x", {}, 0, 1, chip.hbm, cost)
    assert demand.seconds(chip) == pytest.approx({"compute": 1e-3, "memory": 3e-3, "links": 2e-3})
    assert demand.fits(chip)
    assert not Demand("x", {}, 0, 1, chip.hbm + 1, cost).fits(chip)
    assert not Demand("x", {}, 0, 1, 1).fits(None)


def test_what_does_not_fit_is_said_with_what_would_need_less():
    chip, way = CHIPS["h100"], Way(setting(1, 1, 1), {})
    update = lambda stored, peak: {"stage 2": Demand("stage 2", {"x": stored}, 0, peak, peak)}
    assert excess(way, update(1, chip.hbm), chip, None) is None
    over = excess(way, update(1, chip.hbm + 7), chip, {"num_prompts": 3})
    words = ["--remat full", "--microbatches 2", "--num-prompts 3", "more chips"]
    assert over == {"program": "stage 2", "bytes": 7, "try": words}
    stored = excess(way, update(chip.hbm, chip.hbm + 7), chip, None)
    assert stored["try"] == ["more chips"]  # nothing else helps what is stored
