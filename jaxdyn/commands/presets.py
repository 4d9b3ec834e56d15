"""`jaxdyn presets`: the pipelines that have a name, and what they need."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jaxdyn.commands.output import refuse_another
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.chips import GIB
from jaxdyn.plan.needs import Need, hardware, needs, parameters
from jaxdyn.presets import PRESETS, Preset, preset
from jaxdyn.storage.files import write_file


def presets(names: Sequence[str] = (), json: str | None = None) -> dict[str, Any]:
    """Print the table; returns the figures (those of `--json`), by name, in bytes.

    Raises:
      JaxdynError: for a name that no preset has.
    """
    if json:
        refuse_another(Path(json), "list of presets", lambda known: known <= PRESETS.keys())
    chosen = {name: preset(PRESETS, name) for name in names or PRESETS}
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is taken for it
    found = {name: figures(one) for name, one in chosen.items()}
    show(found)
    if json:
        write_file(Path(json), json_format.dumps(found, indent=1) + "\n")
    return found


def figures(one: Preset) -> dict[str, Any]:
    """All of a preset, as plain data."""
    shape = SHAPES[one.shape]
    commands = {}
    for command, config in one.runs.items():
        stages = needs(shape, config, one.scoring)
        train = config.train
        commands[command] = {
            "model": config.model.path,
            "data": config.data.name,
            "steps": train.steps,
            "sequences": train.sequences,
            "stages": {need.stage: of_stage(need) for need in stages},
            "chips": hardware(shape, config, stages),
        }
    return {
        "text": one.text,
        "shape": one.shape,
        "parameters": count(shape),
        "reward_model_parameters": None if one.scoring is None else count(one.scoring),
        "source": list(one.source),
        "given": list(one.given),
        "commands": commands,
    }


def count(shape: Any) -> int:
    """Parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(parameters(shape)))


def of_stage(need: Need) -> dict[str, Any]:
    beside = {"gradient": need.gradient, "activations": need.activations, "peak": need.peak}
    return {"stored": need.stored, **beside}


def show(found: dict[str, Any]) -> None:
    """The table, and what it does not say."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(table(found))
    say(
        "GiB, if all on one device: what is stored (parameters, the optimizer's state, reference "
        "and reward model, key-value caches), what an update takes beside it (its gradient, and "
        "what its forward pass keeps, counted and not compiled), and all at once; then the fewest "
        "chips that hold it. `jaxdyn plan SHAPE` compiles."
    )
    for name, one in found.items():
        say(f"\n{name}: {one['text']}")
        for command, told in one["commands"].items():
            say(f"  jaxdyn {command} --preset {name}   ({told['steps']} steps)")
        if one["source"]:
            say(f"  from the source: {'; '.join(one['source'])}. All else is ours.")
        if one["given"]:
            say(f"  to be given: {', '.join('--' + field for field in one['given'])}")


def table(found: dict[str, Any]) -> Table:
    """A line a stage."""
    drawn = Table(box=box.SIMPLE_HEAD)
    memory = ("params", "optim", "frozen", "cache", "beside", "peak")
    for column in ("preset", "model", "stage", *memory, "h100", "v5p", "v5e"):
        left = column in ("preset", "stage")
        drawn.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, one in found.items():
        title, size = name, short(one["parameters"])
        for command, told in one["commands"].items():
            chips = [str(n or "> 64") for n in told["chips"].values()]
            for stage, need in told["stages"].items():
                held = need["stored"]
                frozen = held.get("reference", 0) + held.get("reward model", 0)
                beside = need["gradient"] + need["activations"]
                cells = [held["parameters"], held["optimizer"], frozen, held.get("cache", 0)]
                drawn.add_row(
                    *(title, size, f"{command}: {stage}"),
                    *(gib(x) for x in (*cells, beside, need["peak"])),
                    *chips,
                )
                title, size, chips = "", "", ["", "", ""]
    return drawn


def gib(x: int) -> str:
    return "" if not x else f"{x / GIB:.1f}" if x >= GIB / 20 else "< 0.1"


def short(count: int) -> str:
    """2.78 B, 135 M, 0.3 M."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
