"""`jaxdyn influence --from-sketch`: of each completion the stored gradients nearest to its own.

Writes `nearest.json`, and prints of each the first few.
"""

import dataclasses
import json
import time
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn import kernels
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.commands.kernel import read_file, texts_of
from jaxdyn.commands.kernel_places import Places, completion_places
from jaxdyn.commands.kernel_subject import Subject, open_subject
from jaxdyn.commands.output import refuse_another
from jaxdyn.commands.text_options import TextOptions, bytes_of
from jaxdyn.kernels.store import digest
from jaxdyn.storage.files import write_file
from jaxdyn.train.progress import Progress
from jaxdyn.types import COMPONENTS, JaxdynError

SHOWN = 4
"""Completions that are printed, at most."""


def look_up(options: InfluenceOptions, progress: Progress) -> Path:
    """Sketch the completions, find their neighbours, write and print them; the file's path.

    Raises:
      JaxdynError: if the file, the model or the completions are not as they should be.
    """
    path = options.destination(None) / "nearest.json"
    refuse_another(path, "neighbours", lambda names: "neighbours" in names)
    stored = kernels.open_sketches(str(options.from_sketch))
    asked = query_options(options, stored)
    examples = read_file(asked, progress)
    subject = open_subject(asked)
    stored.require_model(subject.model.config)
    if stored.about.get("params") != digest(subject.params):
        progress.console.print("the sketches are of other parameters of this model's shape")
    places = completion_places(asked, subject, texts_of(asked, examples, subject.tokenizer))
    queries = sketch_of(stored, subject, places, bytes_of(options.memory_budget))
    began = time.perf_counter()
    found = kernels.nearest_sketches(stored, queries, options.top)
    seconds = time.perf_counter() - began
    if jax.process_index() == 0:
        neighbours = [told(stored, found, places, n) for n in range(len(queries))]
        about = {
            "jaxdyn": jaxdyn.__version__,
            "rows": len(stored),
            "sketches": stored.about,
            "model": subject.name,
            "config": dataclasses.asdict(options),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"about": about, "neighbours": neighbours}, indent=1) + "\n")
        show(neighbours, found.largest, len(stored), seconds)
    return path


def query_options(options: InfluenceOptions, stored: kernels.SketchFile) -> TextOptions:
    """The completions as texts, read as those of the file were."""
    config = stored.about.get("config")
    template = config.get("prompt_template") if isinstance(config, dict) else "auto"
    if template not in typing.get_args(typing.get_type_hints(TextOptions)["prompt_template"]):
        raise JaxdynError(f"{stored.path} names no prompt template that we have, {template!r:.60}")
    if stored.preconditioned and options.run is None:
        raise JaxdynError(f"{stored.path} is in the metric of a run's Adam: give RUN, not --model")
    return TextOptions(
        prompts=str(options.completions),
        model=options.model,
        run=options.run,
        step=options.step,
        untie=options.untie,
        preconditioned=stored.preconditioned,
        prompt_template=typing.cast(Any, template),
        completion_field="completion",
        limit=options.limit,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
        quantity="sequence",
    )


def sketch_of(
    stored: kernels.SketchFile, subject: Subject, places: Places, budget: int
) -> kernels.Sketch:
    """The completions' sketches, which compare with the file's."""
    assert places.rollout is not None
    return kernels.sketch_sequences(
        subject.model,
        subject.params,
        places.rollout,
        stored.key,
        preconditioner=subject.preconditioner,
        replicates=stored.replicates,
        side=stored.side,
        memory_budget=budget,
    )


def told(
    stored: kernels.SketchFile, found: kernels.Nearest, places: Places, query: int
) -> dict[str, Any]:
    """What is written of a completion: its neighbours with their texts."""

    def one(rows: np.ndarray, kernel: kernels.Kernel, cosines: np.ndarray) -> list[dict[str, Any]]:
        names = ("total", "standard_error", *COMPONENTS)
        numbers = {name: np.asarray(getattr(kernel, name))[query].tolist() for name in names}
        return [
            {"row": row, "context": stored.text("context", row)}
            | {"target": stored.text("target", row), "cosine": float(cosines[query][i])}
            | {name: x[i] for name, x in numbers.items()}
            for i, row in enumerate(rows[query].tolist())
        ]

    return {
        "prompt": places.contexts[query],
        "completion": places.target_texts[query],
        "error_of_a_row": float(found.error[query]),
        "up": one(found.up, found.of_up, found.up_cosines),
        "down": one(found.down, found.of_down, found.down_cosines),
    }


def show(neighbours: list[dict[str, Any]], largest: float, count: int, seconds: float) -> None:
    """The first completions with their neighbours."""
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    for one in neighbours[:SHOWN]:
        say(f"{one['prompt'][-60:]!r} {one['completion'][:60]!r}")
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("row", "⟨g, g'⟩", "± 1 s.e.", "cosine", "text"):
            table.add_column(column, justify="left" if column == "text" else "right")
        for x in (*one["up"], *reversed(one["down"])):
            numbers = f"{x['total']:+.3g}", f"{x['standard_error']:.2g}", f"{x['cosine']:+.2f}"
            text = f"{x['context'][-40:]!r} {x['target'][:30]!r}"
            table.add_row(str(x["row"]), *numbers, text)
        console.print(table)
    say(
        f"{len(neighbours)} completions against {count} rows: {seconds:.2f} s. Of rows without any "
        f"relation the outermost would be {largest:.1f} standard errors from 0."
    )
