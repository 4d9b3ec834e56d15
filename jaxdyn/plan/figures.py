"""A plan as plain data, as `jaxdyn plan --json` writes it; bytes and flops are one device's."""

import dataclasses
from typing import Any

from jaxdyn.plan.chips import Chip
from jaxdyn.plan.cuda import UNKNOWN
from jaxdyn.plan.demand import Demand
from jaxdyn.plan.meshes import Way
from jaxdyn.plan.text import Number
from jaxdyn.plan.topologies import Topology
from jaxdyn.sections import AXES


def figures(
    preset: str,
    topology: Topology,
    ways: list[Way],
    demands: dict[str, Demand],
    most: dict[str, int] | None,
) -> dict[str, Any]:
    """All of a plan: the ways tried, the programs of the first, and the largest batch there."""
    chip, run = topology.chip, ways[0].setting.run
    rows = ways[0].setting.rows
    found: dict[str, Any] = {
        "preset": preset,
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
            "scored": ways[0].setting.scored if ways[0].setting.scorer else None,
        },
        "programs": {name: of_program(demand, chip) for name, demand in demands.items()},
        "largest_batch": most,
        "excess": excess(ways[0], demands, chip, most),
        "unknown": UNKNOWN if topology.platform == "gpu" else None,
        "meshes": [
            {
                "mesh": way.shape,
                "fits": way.fits(chip),
                "peak": way.peak,
                "step_seconds": None if chip is None else way.step_seconds(chip),
            }
            for way in ways
        ],
    }
    stages = {name: demands[name] for name in ("stage 1", "stage 2") if name in demands}
    if chip is not None:
        rollout = demands["rollout"].least(chip)
        found["rollout_tokens_per_second"] = rows * run.sampling.max_completion_length / rollout
        setting = ways[0].setting
        scores = setting.batches * demands["reward"].least(chip) if setting.scorer else 0
        found["step_seconds"] = {
            name: rollout + scores + one.least(chip) for name, one in stages.items()
        }
    shares = share_of_stage_1(demands.get("stage 1"), demands["stage 2"], chip)
    return {**found, "stage_1_share": shares}


def share_of_stage_1(
    one: Demand | None, two: Demand, chip: Chip | None
) -> dict[str, Number | None] | None:
    """Of the joint update's needs those of the classifier's; None where it has no matrix."""
    if one is None:
        return None
    shares: dict[str, Number | None] = {"own": one.own / two.own, "peak": one.peak / two.peak}
    if one.cost and two.cost:
        shares["flops"] = one.cost.flops / two.cost.flops
        shares["collective_bytes"] = ratio(one.cost.collective_bytes, two.cost.collective_bytes)
    if chip is not None:
        shares["seconds"] = ratio(one.least(chip), two.least(chip))
    return shares


def excess(
    way: Way, demands: dict[str, Demand], chip: Chip | None, most: dict[str, int] | None
) -> dict[str, Any] | None:
    """By how much the program that needs most exceeds the memory, and what would need less."""
    worst = max(demands.values(), key=lambda demand: demand.peak)
    if chip is None or worst.peak <= chip.hbm:
        return None
    train, remat = way.setting.run.train, way.setting.run.model.remat
    advice = []
    if sum(worst.roles.values()) < chip.hbm:  # it is not what is stored that does not fit
        parts = way.shape[0] * way.shape[1]
        if worst.name == "stage 2" and remat != "full":
            advice.append("--remat full")
        if (
            worst.name.startswith("stage")
            and way.setting.rows % (2 * parts * train.microbatches) == 0
        ):
            advice.append(f"--microbatches {2 * train.microbatches}")
        if most and most["num_prompts"]:
            advice.append(f"--num-prompts {most['num_prompts']}")
    advice.append("more chips")
    return {"program": worst.name, "bytes": worst.peak - chip.hbm, "try": advice}


def of_program(demand: Demand, chip: Chip | None) -> dict[str, Any]:
    """A program's figures; without its cost where it was refused for its memory."""
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


def ratio(a: Number, b: Number) -> Number | None:
    return a / b if b else None
