"""`jaxdyn kernel`: the kernel of a model between places in your texts, as a file and a picture.

Writes `kernel.npz`, which `jaxdyn.report.kernel_file.load_kernel` reads, and `kernel.png`. Finished
tiles of a large kernel are kept in `blocks` until then, so that a killed command goes on when it is
given again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn import kernels
from jaxdyn.commands.kernel_options import KernelOptions
from jaxdyn.commands.kernel_places import Places, Texts, completion_places, prompt_places
from jaxdyn.commands.kernel_subject import Subject, open_subject
from jaxdyn.commands.output import BLOCKS, finish, is_finished, refuse_finished, tidy
from jaxdyn.commands.text_options import TextOptions, bytes_of
from jaxdyn.data import DataConfig, Example, JsonlFile, Tokenizer, read_examples, written
from jaxdyn.hosts import fetch
from jaxdyn.report.kernel_figure import drawn_kernel
from jaxdyn.report.kernel_file import SavedKernel, load_kernel
from jaxdyn.storage.files import naming
from jaxdyn.train.progress import Progress
from jaxdyn.types import COMPONENTS, JaxdynError, Sites


def run(options: KernelOptions, progress: Progress | None = None) -> Path:
    """Compute the kernel, write and draw it, print a summary; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the prompts, the model, the options.
    """
    progress = progress or Progress()
    output = Path(options.output)
    path = output / "kernel.npz"
    refuse_finished(output, {"kernel.npz", "kernel.png"})
    if is_finished(path, options, lambda there: load_kernel(there).about):
        tidy(output)
        print_summary(load_kernel(path), path)
        return path
    examples = read_file(options, progress)
    with jax.enable_x64(options.dtype == "float64"):
        subject = open_subject(options)
        texts = texts_of(options, examples, subject.tokenizer)
        find = prompt_places if texts.completions is None else completion_places
        places = find(options, subject, texts)
        count = len(places.contexts)
        what = "completions" if places.rollout else "sites"
        progress.console.print(f"{options.quantity} kernel of {count} {what}", highlight=False)
        with naming(output):
            (output / BLOCKS).mkdir(parents=True, exist_ok=True)
        kernel = compute(options, subject, places, progress)
        saved = to_save(options, subject, texts, places, kernel)
        if jax.process_index() > 0:
            return path
        picture = {output / "kernel.png": drawn_kernel(saved)} if count > 1 else {}
        finish(output, {**picture, path: saved.packed()})
        print_summary(saved, path)
    return path


def read_file(options: TextOptions, progress: Progress) -> list[Example]:
    """The file's first `limit` rows; says so if there are more."""
    file = JsonlFile(options.prompts, options.prompt_field, options.completion_field)
    taken, more = read_examples(file, options.limit)
    if more:
        text = f"the first {options.limit} lines of {options.prompts}; --limit 0 takes all"
        progress.console.print(text, highlight=False, soft_wrap=True)
    return taken


def texts_of(options: TextOptions, examples: list[Example], tokenizer: Tokenizer) -> Texts:
    """Prompts and completions as the model reads them."""
    how = DataConfig(prompt_template=options.prompt_template)
    rows = [written(example, how, tokenizer) for example in examples]
    completed = options.completion_field is not None
    completions = [row["completion"] for row in rows] if completed else None
    return Texts([row["prompt"] for row in rows], completions)


# -- the kernel -----------------------------------------------------------------------------------


def compute(
    options: KernelOptions, subject: Subject, places: Places, progress: Progress
) -> kernels.Kernel:
    """The kernel, and if asked for its gradient component by kind and layer."""
    model, params, blocks = subject.model, subject.params, Path(options.output) / BLOCKS
    common: dict[str, Any] = {
        "preconditioner": subject.preconditioner,
        "method": options.method,
        "memory_budget": bytes_of(options.memory_budget),
    }
    if options.devices != 1:
        here = jax.local_devices()
        if options.devices > len(here):
            raise JaxdynError(f"devices is {options.devices}; this host has {len(here)}")
        common["devices"] = here[: options.devices or None]
    with progress.tiles(f"{options.quantity}, tiles") as report:
        how = {**common, "progress": report, "blocks": blocks / "kernel"}
        if places.rollout is not None:
            return kernels.sequence_kernel(model, params, places.rollout, **how)
        if options.quantity == "trace":
            if options.num_probes is not None:
                how |= {"num_probes": options.num_probes, "key": jax.random.key(options.seed)}
            return kernels.trace_kernel(model, params, places.sites, mean=options.mean, **how)
        how["by_part"] = options.by_part
        return kernels.log_prob_kernel(model, params, places.sites, **how)


# -- the file and the summary ---------------------------------------------------------------------


def to_save(
    options: KernelOptions,
    subject: Subject,
    texts: Texts,
    places: Places,
    kernel: kernels.Kernel,
) -> SavedKernel:
    """Everything needed to read the kernel again, as host arrays."""
    sites = {f.name: np.asarray(getattr(places.sites, f.name)) for f in dataclasses.fields(Sites)}
    entry, unit = options.described
    model = subject.model
    about = {
        "jaxdyn": jaxdyn.__version__,
        "quantity": options.quantity,
        "entry": entry,
        "unit": unit,
        "targets": places.targets,
        "preconditioned": kernel.preconditioned,
        "representation_form": kernel.representation_form,
        "model": {
            "name": subject.name,
            "step": subject.step,
            "dtype": options.dtype,
            "config": dataclasses.asdict(model.config),
        },
        "config": dataclasses.asdict(options),
    }
    error = kernel.standard_error
    components = {part: wide(getattr(kernel, part)) for part in COMPONENTS}
    by_part = {kind: wide(x) for kind, x in (kernel.parts or {}).items()}
    features = None if places.features is None else wide(places.features)
    return SavedKernel(
        **components,
        **sites,
        contexts=np.array(places.contexts, np.str_),
        target_texts=np.array(places.target_texts, np.str_),
        prompts=np.array(texts.prompts, np.str_),
        completions=np.array(texts.completions or [""] * len(texts.prompts), np.str_),
        about=about,
        parts=by_part,
        standard_error=None if error is None else wide(error),
        features=features,
        statistics=kernels.summarize(components, by_part, features),
    )


def wide(x: jax.Array) -> np.ndarray:
    """A host array that NumPy can read again: bfloat16 as float32."""
    host = fetch(x)
    return host.astype(np.float32) if x.dtype == jnp.bfloat16 else host


def print_summary(saved: SavedKernel, path: Path) -> None:
    """What the kernel is made of, the signs of the features' inner products, and the picture."""
    count, found = len(saved.contexts), saved.statistics
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("component", "share", "effective rank"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name in ("total", *COMPONENTS):
        if f"spectrum/{name}" in found:
            share = 1.0 if name == "total" else float(found[f"share/{name}"][0])
            rank = float(found[f"effective_rank/{name}"])
            table.add_row(name, f"{round(share, 3) + 0.0:.3f}", f"{rank:.1f} of {count}")
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    say(f"{saved.about['entry']}: {count} × {count}")
    console.print(table)
    if saved.features is not None and count > 1:
        cosines = found["features/cosines"]
        say(
            f"pairs of features ⟨φ, φ'⟩: {np.mean(cosines < 0):.1%} below 0, "
            f"{np.mean(cosines > 0):.1%} above; mean cosine {np.mean(cosines):.3f}"
        )
    if saved.standard_error is not None:
        error = np.median(saved.standard_error / np.maximum(np.abs(saved.total), 1e-30))
        say(f"standard error of an entry's estimate (median): {error:.1%}")
    if count > 1:
        say(f"picture: {path.with_suffix('.png')}")
