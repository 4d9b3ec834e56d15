"""`jaxdyn influence`: who moved whom in a training step, as a file, a summary and a table.

Writes `influence.npz`, which `jaxdyn.report.influence_file.load_influence` reads again with no
model, and `influence.json`. A run's step is taken again as training took it, so what its update is
the sum of adds up to what it changed. From outside there is no update, only its completions.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.commands.influence_places import (
    Related,
    batch_sites,
    own_weights,
    relate,
    token_places,
)
from jaxdyn.commands.kernel import tiles, wide
from jaxdyn.commands.kernel_options import bytes_of
from jaxdyn.commands.output import refuse_others
from jaxdyn.dynamics import Influence, contributions, influence, own_tokens, site_texts
from jaxdyn.hosts import fetch
from jaxdyn.paths import write_whole
from jaxdyn.report.influence_file import COLUMNS, FUNCTIONS, SavedInfluence
from jaxdyn.report.origins import ORIGINS, summarize_influence
from jaxdyn.train.probe import Probe
from jaxdyn.train.progress import Progress
from jaxdyn.train.retake import batch_rollout, take_updates
from jaxdyn.train.saved import SavedRun, open_run
from jaxdyn.train.step import prepare_step
from jaxdyn.types import COMPONENTS, Components, JaxdynError, Rollout, Sites

FILES = {"influence.npz", "influence.json", "influence.partial"}


class Account(NamedTuple):
    """What was found, and between what."""

    sites: Sites
    related: Related
    rollout: Rollout
    columns: Components
    arrays: dict[str, Any]  # of `SavedInfluence`, where there are any
    texts: dict[str, Any]
    about: dict[str, Any]
    tokenizer: Any


def run(options: InfluenceOptions, progress: Progress | None = None) -> Path:
    """Take the step again, say who moved whom, write and print it; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the run, the step, the options.
    """
    progress = progress or Progress()
    with open_run(str(options.run)) as saved:
        step = step_of(options, saved)
        output = options.destination(step)
        refuse_others(output, FILES)
        return write(account_of_step(options, saved, step, progress), options, output)


def step_of(options: InfluenceOptions, saved: SavedRun) -> int:
    """The step to take again.

    Raises:
      JaxdynError: if it has no checkpoint before it, or none follows its checkpoint.
    """
    if saved.config.kind != "rl":
        raise JaxdynError(f"{saved.path} is a run of jaxdyn {saved.config.kind}; wanted one of rl")
    if options.step is not None:
        step = saved.find(options.step)
        if not saved.follows(step):
            raise JaxdynError(f"no step of {saved.path} follows its checkpoint {step}")
        return step
    followed = [step for step in saved.steps if saved.follows(step)]
    if not followed:
        raise JaxdynError(
            f"{saved.path} keeps no checkpoint that a step follows, got {saved.steps}; train with "
            "--train.checkpoint-every and --train.keep-checkpoints 0"
        )
    return followed[-1]


def account_of_step(
    options: InfluenceOptions, saved: SavedRun, step: int, progress: Progress
) -> Account:
    """The account of a run's step: of all its inner epochs together."""
    task = saved.task
    stage, state = saved.begin(step)
    prepared = prepare_step(task, state, stage, step)
    rollout, of_batch = batch_rollout(prepared), options.look_at == "batch"
    if of_batch:
        counts = options.site_completions, options.sites_per_completion
        sites = batch_sites(rollout, *counts, options.seed)
    else:
        sites = Probe(task).sites
    related = relate(sites, rollout, of_batch)
    places = places_of(options, rollout)
    how: dict[str, Any] = {"memory_budget": bytes_of(options.memory_budget)}

    found: list[tuple[Influence, dict[str, Components]]] = []
    weights: list[np.ndarray] = []
    with tiles(progress, f"step {step}") as report:
        for update in take_updates(task, state, stage, prepared):
            common: dict[str, Any] = {
                "weights": update.weights,
                "temperature": update.temperature,
                "metric": update.metric,
            }
            account = influence(
                task.model,
                update.before,
                update.after,
                sites,
                rollout,
                **common,
                clip=update.clip,
                others=update.others,
                progress=report,
                **how,
            )
            beside: dict[str, Components] = {}
            if of_batch:
                own = {**common, "weights": own_weights(update.weights, related)}
                beside["itself"] = own_tokens(task.model, update.before, sites, **own)
            if places is not None:
                given = {**common, "places": places, **how}
                beside["by_token"] = contributions(
                    task.model, update.before, sites, rollout, **given
                )
            found.append(fetch((account, beside)))
            weights.append(update.weights)
    account, beside = jax.tree.map(lambda *x: sum(x[1:], x[0]), *found)
    arrays: dict[str, Any] = {name: stacked(x) for name, x in {**account.others, **beside}.items()}
    arrays |= {"first_order": account.first_order, "actual": account.actual, "places": places}
    experience = prepared.experience
    texts = {
        "prompts": experience.prompts,
        "completions": experience.completions,
        "advantages": wide(prepared.batch.advantages),
        "rewards": np.asarray(experience.rewards.total, np.float64),
        "weights": weights[0],
    }
    about = {
        "model": f"{saved.path.resolve().name}, step {step}",
        "step": step,
        "stage": stage.name,
        "learning_rate": prepared.rate,
        "epochs": len(found),
        "unit": "nats",
        "temperature": task.config.sampling.temperature,
        "loss": dataclasses.asdict(task.config.loss),
        "optim": dataclasses.asdict(task.config.optim),
    }
    tokenizer = saved.loaded.tokenizer
    return Account(sites, related, rollout, account.completions, arrays, texts, about, tokenizer)


def places_of(options: InfluenceOptions, rollout: Rollout) -> np.ndarray | None:
    """The tokens to take one by one.

    Raises:
      JaxdynError: if there is no such completion, or it has no token.
    """
    if not options.by_token:
        return None
    count = len(rollout.completion_ids)
    for number in options.by_token:
        if not 0 <= number < count:
            raise JaxdynError(f"by_token names completion {number}; they go from 0 to {count - 1}")
    places = token_places(rollout, options.by_token)
    if not len(places):
        raise JaxdynError(f"completions {list(options.by_token)} have no token")
    return places


def stacked(x: Components) -> np.ndarray:
    """The components along a first axis."""
    return np.stack([getattr(x, name) for name in COMPONENTS])


# -- the files and the table ----------------------------------------------------------------------


def write(account: Account, options: InfluenceOptions, output: Path) -> Path:
    """Write both files and print the table; returns the first one's path."""
    saved = to_save(account, options)
    path = output / "influence.npz"
    if jax.process_index() > 0:
        return path
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "influence.partial"
    saved.write(partial)
    partial.replace(path)
    summary = summarize_influence(saved)
    told = {"about": saved.about, "sites": len(saved.rows), "completions": len(saved.group)}
    write_whole(output / "influence.json", json.dumps(told | summary, indent=1) + "\n")
    print_summary(saved, summary)
    return path


def to_save(account: Account, options: InfluenceOptions) -> SavedInfluence:
    """Everything needed to read it again, as host arrays."""
    sites = {f.name: np.asarray(getattr(account.sites, f.name)) for f in dataclasses.fields(Sites)}
    contexts, targets = site_texts(account.tokenizer, account.sites)
    texts = dict(account.texts)
    for name in ("prompts", "completions"):
        texts[name] = np.array(texts[name], np.str_)
    components = {name: np.asarray(getattr(account.columns, name)) for name in COMPONENTS}
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
    rows += [name for name in COLUMNS if name in saved.others]
    rows += ["completions", "residual", "second_order", "actual"]
    for name in rows:
        found = [summary[function]["mean"].get(name) for function in FUNCTIONS]
        if found[0] is not None:
            parts = ("total", "representation")
            cells = [f"{f[p]:+.3g}" if p in f else "" for f in found for p in parts]
            table.add_row(name.replace("_", " "), *cells)
    console.print(table)
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
