"""A plan as tables and lines, drawn from its figures."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxdyn.plan.chips import GIB


def show(found: dict[str, Any]) -> None:
    """Print all that a plan's figures say."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    mesh = tuple(found["mesh"].values())
    say(f"{found['preset']} on {found['topology']}: {found['devices']} devices, mesh {mesh}")
    console.print(program_table(found))
    for line in summary(found):
        say(line)
    if len(found["meshes"]) > 1:
        console.print(mesh_table(found))


def program_table(found: dict[str, Any]) -> Table:
    """One line a program."""
    table = Table(box=box.SIMPLE_HEAD)
    memory = ("params", "optim", "cache", "temp", "peak", "of HBM")
    for column in ("program", *memory, "Tflop", "GB", "sent", "ms", "limit"):
        left = column in ("program", "limit")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    gib = lambda x: f"{x / GIB:.2f}" if x else ""
    chip = found["chip"]
    for name, program in found["programs"].items():
        role = lambda *of, held=program["bytes_by_role"]: gib(sum(held.get(n, 0) for n in of))
        cells = [
            name,
            role("parameters", "reference", "reward model"),
            role("optimizer"),
            role("cache", "factors"),
        ]
        cells += [gib(program["temporary"]), gib(program["peak"])]
        cells.append(f"{program['peak'] / chip['hbm']:.0%}" if chip else "")
        if "flops" not in program:
            cells += ["", "", "", "", "does not fit"]
        else:
            cells.append(f"{program['flops'] / 1e12:.3g}")
            cells += [f"{program[key] / 1e9:.3g}" for key in ("bytes", "collective_bytes")]
            limit = program.get("limit", "")
            cells += [f"{1e3 * program['seconds'][limit]:.3g}" if limit else "", limit]
        table.add_row(*cells)
    return table


def mesh_table(found: dict[str, Any]) -> Table:
    """The meshes that were tried, the best first."""
    table = Table(box=box.SIMPLE_HEAD, title="meshes tried")
    for column in (*found["mesh"], "peak GiB", "step ms"):
        table.add_column(column, justify="right")
    for way in found["meshes"]:
        time = f"{1e3 * way['step_seconds']:.4g}" if found["chip"] and way["fits"] else ""
        table.add_row(*map(str, way["mesh"]), f"{way['peak'] / GIB:.2f}", time)
    return table


def summary(found: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    batch, shares = found["batch"], found["stage_1_share"]
    lines = [
        "per chip: GiB of the policy and models that stay, the optimizer, caches (or a kernel's "
        "factors), temporaries, and all that lies there at once; flops; GB read and written, GB "
        "sent",
        f"batch: {batch['num_prompts']} prompts x {batch['num_generations']} completions, "
        f"{batch['prompt_slots']} + {batch['completion_slots']} tokens",
    ]
    if batch["scored"]:
        lines.append(f"reward: {batch['scored']} sequences a pass")
    if found["largest_batch"]:
        most = found["largest_batch"]
        lines.append(
            f"largest batch that fits: {most['num_prompts']} prompts, {most['sequences']} "
            "sequences (a linear model of the peaks of two batches)"
        )
    if "step_seconds" in found:
        step = found["step_seconds"]
        times = ", ".join(f"{seconds:.3g} s in {name}" for name, seconds in step.items())
        lines.append(
            f"at the chips' full rates: rollout {found['rollout_tokens_per_second']:,.0f} tokens/s;"
            f" a step {times}"
        )
    if shares is None:
        lines.append("no stage 1: the classifier is tied to the embedding (--untie plans a copy)")
    else:
        parts = [
            f"{shares[key]:.1%} of its {what}"
            for key, what in (("flops", "flops"), ("own", "memory"), ("seconds", "time"))
            if shares.get(key) is not None
        ]
        lines.append(f"stage 1's update against stage 2's: {', '.join(parts)}")
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in found["mesh"].items())
    if len(found["meshes"]) > 1:
        lines.append(f"suggested mesh: {mesh}")
    if found["excess"]:
        over = found["excess"]
        lines.append(
            f"does not fit, by {over['bytes'] / GIB:.1f} GiB ({over['program']}); "
            f"try {', '.join(over['try'])}"
        )
    if found["unknown"]:
        lines.append(found["unknown"])
    if names := {name for program in found["programs"].values() for name in program["uncounted"]}:
        lines.append(f"not counted: the work of {', '.join(sorted(names))}")
    return lines
