"""Plans for TPU slices, memory per chip, and weak scaling, all from compiled programs alone.

Claims:
  plans    the paper's model (Pythia-2.8B, 512 tokens) and one of 8B parameters compile for v5e-64,
           v5p-8, v6e-16 and v7x-8, eight H100, eight H200 and two hosts of eight H100:
           memory, time and limit of every program there.
  memory   what a run of the paper's model keeps on a chip of a v5e-64, a v5p-8 and an H200, and
           stage 1's share of each. For the H200 that is what is stored, exactly; what its compiler
           adds for temporaries only a machine with one can say (`jaxdyn plan --topology here`).
  scaling  with a fixed batch a device on 1, 2, 4 and 8 devices, an update's flops a device stay
           what they are, and what a device sends follows the curve of its collectives.
Command:   python experiments/benchmarks/plans.py [plans] [scaling] [--cases "llama-8b v5e-64" ...]
Time:      two to five CPU minutes a plan, of which there are fourteen, and one for the scaling.
Expected:  tables on the screen, results/plans.md, results/plans.json, results/plans_scaling.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

GIB = 2**30
CASES = [
    f"{preset} {topology}"
    for preset in ("pythia-2.8b", "llama-8b")
    for topology in ("v5e-64", "v5p-8", "v6e-16", "v7x-8", "h100:8", "h200:8", "h100:2x8")
]
DEVICES = (1, 2, 4, 8)
MODEL = {"vocab_size": 2048, "width": 256, "num_layers": 4, "num_heads": 8}


# -- plans ----------------------------------------------------------------------------------------


def plan(preset: str, topology: str) -> dict:
    """`jaxdyn plan`, in a process of its own: its figures, and what it prints."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "jaxdyn.cli", "plan", preset, "--topology", topology]
        command += ["--meshes", "2", "--json", str(path)]
        before, begun = cpu_seconds(), time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        took = {"seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds() - before}
        print(done.stdout, flush=True)
        return {**json.loads(path.read_text()), "took": took}


def cpu_seconds() -> float:
    """Of processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plans(cases: list[str], output: Path) -> None:
    """Each case's plan, written as soon as it is there beside those of earlier runs."""
    path = output / "plans.json"
    found = json.loads(path.read_text())["plans"] if path.exists() else {}
    for case in cases:
        found[case] = plan(*case.split())
        done = {case: found[case] for case in [*CASES, *cases] if case in found}
        content = {"plans": done, "memory": memory(list(done.values()))}
        harness.write(output, "plans", content)
        path.with_suffix(".md").write_text(markdown(content))


def memory(found: list[dict]) -> list[dict]:
    """The paper's model on each kind of chip: what is stored, and with temporaries the peak."""
    rows = []
    for one in found:
        if one["preset"] == "pythia-2.8b":
            for name in ("stage 1", "stage 2"):
                program = one["programs"][name]
                rows.append(
                    {
                        "chips": one["topology"],
                        "stage": name,
                        "stored": sum(program["bytes_by_role"].values()),
                        "own": program["own"],
                        "peak": program["peak"],
                        "hbm": one["chip"]["hbm"],
                    }
                )
    return rows + stored_on_one("h200")


def stored_on_one(name: str) -> list[dict]:
    """What a run stores on one chip that holds all of it, without temporaries."""
    import jax

    from jaxdyn.commands.plan import planned_run
    from jaxdyn.commands.plan_options import PlanOptions
    from jaxdyn.distributed import make_mesh
    from jaxdyn.models.shapes import SHAPES
    from jaxdyn.plan.chips import CHIPS
    from jaxdyn.plan.demand import bytes_of
    from jaxdyn.plan.programs import Setting
    from jaxdyn.sections import MeshConfig

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    setting = Setting(SHAPES["pythia-2.8b"], planned_run(PlanOptions("pythia-2.8b")), mesh)
    rows = []
    for stage in ("classifier", "joint"):
        program = setting.update(stage)
        trees = [*program.roles.values(), *program.held.values()]
        rows.append(
            {
                "chips": f"{name} (1)",
                "stage": program.name,
                "stored": sum(map(bytes_of, trees)),
                "own": None,
                "peak": None,
                "hbm": CHIPS[name].hbm,
            }
        )
    return rows


def markdown(found: dict) -> str:
    """The plans as tables."""
    lines = ["# Plans", "", "Per chip; times at the chips' full rates. Written by plans.py.", ""]
    if any("took" not in one for one in found["plans"].values()):
        older = "Where no CPU seconds are given, the plan is older: the compiler's own tiles, and a"
        lines += [older, "prompt passed again for each of its completions.", ""]
    for one in found["plans"].values():
        mesh = " x ".join(f"{axis} {size}" for axis, size in one["mesh"].items())
        batch, step = one["batch"], one["step_seconds"]
        lines += [f"## {one['preset']} on {one['topology']} ({one['devices']} chips, {mesh})", ""]
        lines += [
            f"{batch['num_prompts']} prompts x {batch['num_generations']} completions, "
            f"{batch['prompt_slots']} + {batch['completion_slots']} tokens. Rollout "
            f"{one['rollout_tokens_per_second']:,.0f} tokens/s; a step {step['stage 1']:.3g} s in "
            f"stage 1, {step['stage 2']:.3g} s in stage 2. Largest batch: "
            f"{one['largest_batch']['num_prompts']} prompts."
            + (f" Planned in {one['took']['cpu_seconds']:.0f} CPU s." if "took" in one else ""),
            "",
        ]
        columns = ("program", "parameters GiB", "optimizer", "cache", "temporary", "peak", "of HBM")
        columns += ("Tflop", "GB", "GB sent", "ms", "limit")
        lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * 10 + "|---|"]
        for name, program in one["programs"].items():
            lines.append(line(name, program, one["chip"]))
        lines += [
            "",
            "| mesh (data, fsdp, tensor) | fits | peak GiB | step s |",
            "|---|---|---:|---:|",
        ]
        for way in one["meshes"]:
            fits = "yes" if way["fits"] else "no"
            lines.append(
                f"| {way['mesh']} | {fits} | {way['peak'] / GIB:.2f} | {way['step_seconds']:.3g} |"
            )
        lines.append("")
    lines += ["## A run of pythia-2.8b: memory per chip", ""]
    lines += ["| chips | update of | stored GiB | its own GiB | peak GiB | of HBM |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    gib = lambda x: "" if x is None else f"{x / GIB:.2f}"
    for row in found["memory"]:
        of = (row["peak"] or row["stored"]) / row["hbm"]
        cells = [
            row["chips"],
            row["stage"],
            *(gib(row[name]) for name in ("stored", "own", "peak")),
        ]
        lines.append(f"| {' | '.join(cells)} | {of:.0%} |")
    return "\n".join(lines) + "\n"


def line(name: str, program: dict, chip: dict) -> str:
    role = program["bytes_by_role"]
    gib = lambda *names: f"{sum(role.get(n, 0) for n in names) / GIB:.2f}"
    cells = [name, gib("parameters", "reference"), gib("optimizer"), gib("cache", "factors")]
    cells += [f"{program['temporary'] / GIB:.2f}", f"{program['peak'] / GIB:.2f}"]
    cells += [f"{program['peak'] / chip['hbm']:.0%}"]
    if "flops" in program:
        cells += [f"{program['flops'] / 1e12:.3g}", f"{program['bytes'] / 1e9:.3g}"]
        cells += [f"{program['collective_bytes'] / 1e9:.3g}"]
        cells += [f"{1e3 * program['seconds'][program['limit']]:.3g}", program["limit"]]
    else:
        cells += ["", "", "", "", "does not fit"]
    return f"| {' | '.join(cells)} |"


# -- weak scaling ---------------------------------------------------------------------------------


def scaling(sizes: dict[str, int]) -> dict:
    """The updates of a float32 GPT-NeoX on meshes of 1 to 8 devices."""
    import jax

    from jaxdyn.config import RunConfig
    from jaxdyn.distributed import make_mesh
    from jaxdyn.models import gpt_neox
    from jaxdyn.plan.demand import demand_of
    from jaxdyn.plan.programs import Setting
    from jaxdyn.rollout import SamplingConfig
    from jaxdyn.sections import MeshConfig, TrainConfig

    model = gpt_neox(**sizes)
    rows = []
    for axis in ("data", "fsdp"):
        for count in DEVICES:
            ways = {"data": 1, "fsdp": 1, axis: count}
            mesh = make_mesh(MeshConfig(**ways), jax.devices()[:count])
            train = TrainConfig(num_prompts=count, num_generations=8, max_prompt_length=64)
            run = RunConfig(train=train, sampling=SamplingConfig(max_completion_length=64))
            setting = Setting(model, run, mesh)
            for stage in ("classifier", "joint"):
                demand = demand_of(setting.update(stage))
                rows.append(
                    {
                        "axis": axis,
                        "devices": count,
                        "stage": demand.name,
                        "flops": demand.cost.flops,
                        "collective_bytes": demand.cost.collective_bytes,
                        "collectives": {
                            f"{kind} of {group}": n for (kind, group), n in demand.cost.sent.items()
                        },
                        "expected_bytes": expected(setting, axis, count, stage),
                        "own": demand.own,
                    }
                )
    return {"model": {"architecture": "gpt_neox", **sizes, "dtype": "float32"}, "rows": rows}


def expected(setting, axis: str, count: int, stage: str) -> float:
    """What a device has to send, all but per-token figures, norms and biases.

    data   a sum of the gradients of what moves: 2 (n - 1) / n of their bytes
    fsdp   of the body each matrix gathered for the forward pass and again for the backward pass,
           and its gradient summed: 4 (n - 1) / n (3 where the sum is scattered, as on TPUs: the
           compiler for CPUs has it done in whole); its rows' embeddings exchanged, and their
           cotangents; of W nothing, but the features of all rows gathered, and their cotangents
           summed
    """
    import jax

    share, width = (count - 1) / count, 4 * setting.config.width
    nbytes = lambda tree: sum(4 * x.size for x in jax.tree.leaves(tree))
    if axis == "data":
        moving = setting.params if stage == "joint" else setting.params["classifier"]
        return 2 * share * nbytes(moving)
    features = setting.rows * setting.slots[1] * width
    if stage == "classifier":
        return share * features
    embedded = setting.rows // count * sum(setting.slots) * width
    layers = jax.tree.leaves(setting.params["backbone"]["layers"])
    matrices = nbytes([x for x in layers if x.ndim == 3])
    return share * (4 * matrices + 2 * embedded + 3 * features)


def print_scaling(found: dict) -> None:
    print(f"\nweak scaling: {json.dumps(found['model'])}; 8 sequences of 128 tokens a device")
    print(f"{'axis':6}{'devices':>8}  {'update':8}{'Gflop':>8}{'MB sent':>10}{'expected':>10}")
    for row in found["rows"]:
        print(
            f"{row['axis']:6}{row['devices']:>8}  {row['stage']:8}{row['flops'] / 1e9:>8.2f}"
            f"{row['collective_bytes'] / 1e6:>10.2f}{row['expected_bytes'] / 1e6:>10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", help="plans, scaling")
    words = "a preset and a topology each"
    parser.add_argument("--cases", nargs="+", default=CASES, help=words)
    harness.add_output(parser)
    options = parser.parse_args()
    suites = harness.known(options.suites, ("plans", "scaling"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if "plans" in suites:
        plans(options.cases, options.output)
    if "scaling" in suites:
        found = scaling(MODEL)
        print_scaling(found)
        harness.write(options.output, "plans_scaling", found)


if __name__ == "__main__":
    main()
