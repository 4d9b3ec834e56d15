"""`jaxdyn influence`: who moved whom in a training step, as a file, a summary and a table.

Writes `influence.npz`, which `jaxdyn.report.influence_file.load_influence` reads again with no
model, `influence.json` and, of a run's step, the page `influence.html`. The step is taken again as
training took it, so what its update is the sum of adds up to what it changed. From outside there is
no update, only its completions.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn.commands.influence_account import (
    Account,
    account_of_file,
    account_of_step,
    step_of,
)
from jaxdyn.commands.influence_nearest import look_up
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.commands.influence_page import pages_of
from jaxdyn.commands.output import refuse_others
from jaxdyn.dynamics import site_texts
from jaxdyn.report.influence_file import COLUMNS, FUNCTIONS, SavedInfluence, load_influence
from jaxdyn.report.origins import ORIGINS, summarize_influence
from jaxdyn.storage.files import write_files
from jaxdyn.train.progress import Progress
from jaxdyn.train.saved import open_run
from jaxdyn.types import COMPONENTS, Sites

FILES = {"influence.npz", "influence.json", "influence.html"}


def run(options: InfluenceOptions, progress: Progress | None = None) -> Path:
    """Take the step again, say who moved whom, write and print it; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the run, the step, the options.
    """
    progress = progress or Progress()
    if options.from_sketch is not None:
        return look_up(options, progress)
    if options.run is None:
        output = options.destination(None)
        refuse_strangers(output)
        return write(account_of_file(options, progress), options, output)
    with open_run(options.run) as saved:
        step = step_of(options, saved)
        output = options.destination(step)
        refuse_strangers(output)
        return write(account_of_step(options, saved, step, progress), options, output)


# -- the files and the table ----------------------------------------------------------------------


def refuse_strangers(output: Path) -> None:
    """JaxdynError if the output holds anything but an earlier account, which is replaced."""
    pages = {page.name for page in output.glob("influence-*.html")}
    known = (output / "influence.npz").exists()
    refuse_others(output, FILES | pages if known else set())
    if known:
        load_influence(output / "influence.npz")


def write(account: Account, options: InfluenceOptions, output: Path) -> Path:
    """Write the files and print the table; returns the first one's path."""
    saved = to_save(account, options)
    path = output / "influence.npz"
    if jax.process_index() > 0:
        return path
    summary = summarize_influence(saved)
    told = {"about": saved.about, "sites": len(saved.rows), "completions": len(saved.group)}
    page = output / "influence.html"
    shown: dict[Path, str] = {}
    if account.ledger is not None:
        shown = pages_of(saved, account.ledger, account.tokenizer, page)
    # The first says whose the files beside it are.
    described = json.dumps(told | summary, indent=1) + "\n"
    write_files({path: saved.packed(), output / "influence.json": described, **shown})
    print_summary(saved, summary)
    if shown:
        print(f"every token: {page}")
    return path


def to_save(account: Account, options: InfluenceOptions) -> SavedInfluence:
    """Everything needed to read it again, as host arrays."""
    sites = {f.name: np.asarray(getattr(account.sites, f.name)) for f in dataclasses.fields(Sites)}
    contexts, targets = site_texts(account.tokenizer, account.sites)
    texts = dict(account.texts)
    for name in ("prompts", "completions"):
        texts[name] = np.array(texts[name], np.str_)
    components = dict(zip(COMPONENTS, account.columns, strict=True))
    config = dataclasses.asdict(options)
    about = {"jaxdyn": jaxdyn.__version__, "functions": FUNCTIONS, "components": COMPONENTS}
    return SavedInfluence(
        **components,
        **sites,
        **account.related._asdict(),
        **texts,
        **account.arrays,
        contexts=np.array(contexts, np.str_),
        target_texts=np.array(targets, np.str_),
        completion_ids=np.asarray(account.rollout.completion_ids),
        completion_mask=np.asarray(account.rollout.completion_mask),
        about={**about, **account.about, "sites": options.look_at, "config": config},
    )


def print_summary(saved: SavedInfluence, summary: dict[str, Any]) -> None:
    """What moved the sites, on average over them."""
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    unit = saved.about["unit"]
    say(f"{saved.about['model']}: {len(saved.group)} completions, {len(saved.rows)} sites; {unit}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mean over sites")
    for column in ("Δ log π", "representation", "ΔH", "representation"):
        table.add_column(column, justify="right")
    rows = [name for name in ORIGINS if name in shown(saved)]
    rows += [f"advantage_{sign}" for sign in ("positive", "negative")]
    for name in COLUMNS:
        rows += [name] if name in saved.others else []
        rows += list(saved.by_batch) if name == "momentum" else []
    rows += ["completions", "residual", "second_order", "actual"]
    for name in rows:
        found = [summary[function]["mean"].get(name) for function in FUNCTIONS]
        if found[0] is not None:
            parts = ("total", "representation")
            cells = [f"{f[p]:+.3g}" if p in f else "" for f in found for p in parts]
            table.add_row(name.replace("_", " "), *cells)
    console.print(table)
    if min(clips := saved.about.get("clip", [1.0])) < 1:
        told = ", ".join(f"{c:.3g}" for c in clips)
        say(f"the gradient was clipped to {told} of itself; completions count before that")
    if saved.actual is not None:
        sizes = [summary[function]["rms"] for function in FUNCTIONS]
        left = ", ".join(f"{s['residual'] / max(s['actual'], 1e-300):.1e}" for s in sizes)
        say(f"residual / actual change (rms; log π, H): {left}")
    cancelled = [summary[function]["cancellation"] for function in FUNCTIONS]
    told = "; ".join(
        ", ".join(f"{part} {x:.2f}" for part, x in each.items() if part != "cross" or x)
        for each in cancelled
    )
    say(f"cancellation (log π; H), {len(saved.group)} if all push alike, 1 if independent: {told}")


def shown(saved: SavedInfluence) -> tuple[str, ...]:
    """The origins that there are."""
    inside = bool(np.any(saved.site_completion >= 0))
    return ORIGINS if inside else ORIGINS[2:]
