"""`jaxdyn kernel`: the kernel of a model between places in your texts, as a file and a picture.

Writes `kernel.npz` (`jaxdyn.report.load_kernel` reads it again) and `kernel.png`. Finished tiles of
a large kernel are kept in `blocks` until then, so that a killed command goes on when it is given
again.
"""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn import kernels
from jaxdyn.commands.kernel_options import KernelConfig, bytes_of
from jaxdyn.commands.kernel_places import Places, Texts, completion_places, prompt_places
from jaxdyn.data import Tokenizer
from jaxdyn.data.jsonl import JsonlFile, read_jsonl
from jaxdyn.distributed import Layout, make_mesh, require_divisible, shard_model
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel
from jaxdyn.report.kernel_figure import draw_kernel
from jaxdyn.report.kernel_file import COMPONENTS, SavedKernel
from jaxdyn.sections import MeshConfig, ModelSource
from jaxdyn.train.progress import Progress
from jaxdyn.train.saved import open_run
from jaxdyn.train.task import open_model
from jaxdyn.types import Components, JaxdynError, Params, Sites


def run_kernel(config: KernelConfig, progress: Progress | None = None) -> Path:
    """Compute the kernel, write and draw it, print a summary; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the prompts, the model, the options.
    """
    progress = progress or Progress()
    output = Path(config.output)
    refuse_others(output)
    texts = read_texts(config, progress)
    with jax.enable_x64(config.dtype == "float64"):
        subject = open_subject(config)
        places = places_of(config, subject, texts)
        count = len(places.contexts)
        what = "completions" if places.rollout else "sites"
        progress.console.print(f"{config.quantity} kernel of {count} {what}", highlight=False)
        output.mkdir(parents=True, exist_ok=True)
        kernel, parts = compute(config, subject, places, progress)
        saved = to_save(config, subject, texts, places, kernel, parts)
        path, partial = output / "kernel.npz", output / "kernel.partial"
        if jax.process_index() > 0:
            return path
        saved.write(partial)
        if count > 1:
            draw_kernel(partial, output / "kernel.png")
        partial.replace(path)
        shutil.rmtree(output / "blocks", ignore_errors=True)
        print_summary(saved, path)
    return path


def refuse_others(output: Path) -> None:
    """JaxdynError if `output` is a file, or holds anything but this command's unfinished work."""
    if output.exists() and not output.is_dir():
        raise JaxdynError(f"{output} is not a directory; choose another output")
    ours = {"blocks", "kernel.partial", "kernel.png"}
    names = {path.name for path in output.glob("*")}
    if others := sorted(names - ours):
        raise JaxdynError(f"{output} already holds {others[0]}; choose another output")


def read_texts(config: KernelConfig, progress: Progress) -> Texts:
    """The file's first `limit` rows; says so if there are more."""
    rows = read_jsonl(JsonlFile(config.prompts, config.prompt_field, config.completion_field))
    taken = list(itertools.islice(rows, config.limit or None))
    if next(rows, None) is not None:
        text = f"the first {config.limit} lines of {config.prompts}; --limit 0 takes all"
        progress.console.print(text, highlight=False, soft_wrap=True)
    completed = config.completion_field is not None
    completions = [row["completion"] for row in taken] if completed else None
    return Texts([row["prompt"] for row in taken], completions)


# -- the model ------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """Whose kernel it is."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    preconditioner: Params | None
    name: str
    step: int | None


def open_subject(config: KernelConfig) -> Subject:
    """The model of a directory, or of a run's checkpoint with Adam's metric if asked for.

    A run's adapters are merged, so that the kernel is of all parameters, but in Adam's metric
    they stay: the kernel is then of what the run moves.
    """
    preconditioner, step = None, None
    if config.run is None:
        model, params, tokenizer = open_model(ModelSource(str(config.model), config.untie))
        if config.fsdp * config.tensor > 1:
            size = config.fsdp * config.tensor
            mesh = make_mesh(MeshConfig(1, config.fsdp, config.tensor, devices=size))
            require_divisible(mesh, model.config, config.fsdp, "rows")
            model, params = shard_model(model, mesh), Layout(mesh).place(params)
        name = Path(str(config.model)).resolve().name
    else:
        with open_run(config.run) as run:
            step = run.find(config.step)
            # Adam's metric is that of the adapters themselves.
            model, params = run.policy(step, merged=not config.preconditioned)
            tokenizer, optim = run.loaded.tokenizer, run.config.optim
            name = f"{run.path.resolve().name}, step {step}"
            if config.preconditioned:
                if optim.optimizer != "adamw":
                    raise JaxdynError(
                        f"--preconditioned takes Adam's second moments; {run.path} was trained "
                        f"with {optim.optimizer}"
                    )
                preconditioner = kernels.adam_preconditioner(
                    run.state(step).opt_state, params, b2=optim.b2, eps=optim.eps
                )
    dtype = jnp.dtype(config.dtype).type
    if config.dtype == "float64":
        widen = lambda x: x.astype(dtype)
        params, preconditioner = jax.tree.map(widen, (params, preconditioner))
    model = dataclasses.replace(model, dtype=dtype)
    return Subject(model, params, tokenizer, preconditioner, name, step)


def places_of(config: KernelConfig, subject: Subject, texts: Texts) -> Places:
    """What the kernel lies between."""
    model, params, tokenizer = subject.model, subject.params, subject.tokenizer
    if texts.completions is None:
        return prompt_places(model, params, tokenizer, texts, config.max_prompt_length)
    return completion_places(
        model,
        params,
        tokenizer,
        texts,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        sites_per_completion=None if config.quantity == "sequence" else config.sites_per_completion,
        seed=config.seed,
    )


# -- the kernel -----------------------------------------------------------------------------------


def compute(
    config: KernelConfig, subject: Subject, places: Places, progress: Progress
) -> tuple[kernels.Kernel, dict[str, jax.Array]]:
    """The kernel, and if asked for its gradient component by kind and layer."""
    model, params, blocks = subject.model, subject.params, Path(config.output) / "blocks"
    common: dict[str, Any] = {
        "preconditioner": subject.preconditioner,
        "method": config.method,
        "memory_budget": bytes_of(config.memory_budget),
    }
    if config.devices != 1:
        here = jax.local_devices()
        if config.devices > len(here):
            raise JaxdynError(f"devices is {config.devices}; this host has {len(here)}")
        common["devices"] = here[: config.devices or None]
    with tiles(progress, config.quantity) as report:
        options = {**common, "progress": report, "blocks": blocks / "kernel"}
        if places.rollout is not None:
            kernel = kernels.sequence_kernel(model, params, places.rollout, **options)
        elif config.quantity == "trace":
            if config.num_probes is not None:
                options |= {"num_probes": config.num_probes, "key": jax.random.key(config.seed)}
            kernel = kernels.trace_kernel(model, params, places.sites, mean=config.mean, **options)
        else:
            kernel = kernels.log_prob_kernel(model, params, places.sites, **options)
    if not config.by_part:
        return kernel, {}
    with tiles(progress, "by part") as report:
        options = {**common, "progress": report, "blocks": blocks / "by_part"}
        return kernel, kernels.update_kernel_by_part(model, params, places.sites, **options)


@contextlib.contextmanager
def tiles(progress: Progress, title: str) -> Iterator[Callable[[int, int], None]]:
    """What a kernel calls as its tiles finish; the first call may be of many, found on disk."""
    with contextlib.ExitStack() as stack:
        begun: list[int] = []

        def report(done: int, total: int) -> None:
            if not begun:
                begun.append(done)
                stack.enter_context(progress.start(f"{title}, tiles", total, done - 1))
            progress.advance()

        yield report


# -- the file and the summary ---------------------------------------------------------------------


def to_save(
    config: KernelConfig,
    subject: Subject,
    texts: Texts,
    places: Places,
    kernel: kernels.Kernel,
    parts: dict[str, jax.Array],
) -> SavedKernel:
    """Everything needed to read the kernel again, as host arrays."""
    sites = {f.name: np.asarray(getattr(places.sites, f.name)) for f in dataclasses.fields(Sites)}
    entry, unit = config.described
    model = subject.model
    about = {
        "jaxdyn": jaxdyn.__version__,
        "quantity": config.quantity,
        "entry": entry,
        "unit": unit,
        "targets": places.targets,
        "preconditioned": kernel.preconditioned,
        "representation_form": kernel.representation_form,
        "model": {
            "name": subject.name,
            "step": subject.step,
            "dtype": config.dtype,
            "config": dataclasses.asdict(model.config),
        },
        "config": dataclasses.asdict(config),
    }
    error = kernel.standard_error
    return SavedKernel(
        **{part: wide(getattr(kernel, part)) for part in COMPONENTS},
        **sites,
        contexts=np.array(places.contexts, np.str_),
        target_texts=np.array(places.target_texts, np.str_),
        prompts=np.array(texts.prompts, np.str_),
        completions=np.array(texts.completions or [""] * len(texts.prompts), np.str_),
        about=about,
        parts={kind: wide(x) for kind, x in parts.items()},
        standard_error=None if error is None else wide(error),
        features=None if places.features is None else wide(places.features),
    )


def wide(x: jax.Array) -> np.ndarray:
    """A host array that NumPy can read again: bfloat16 as float32."""
    host = fetch(x)
    return host.astype(np.float32) if x.dtype == jnp.bfloat16 else host


def print_summary(saved: SavedKernel, path: Path) -> None:
    """What the kernel is made of, the signs of the features' inner products, and the files."""
    count = len(saved.contexts)
    matrices = {part: jnp.asarray(getattr(saved, part)) for part in ("total", *COMPONENTS)}
    shares = kernels.component_shares(Components(**{n: matrices[n] for n in COMPONENTS}))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("component", "share", "effective rank"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name, matrix in matrices.items():
        if name == "cross" and not matrix.any():
            continue
        share = 1.0 if name == "total" else float(getattr(shares, name))
        rank = float(kernels.effective_rank(kernels.spectrum(matrix)))
        table.add_row(name, f"{round(share, 3) + 0.0:.3f}", f"{rank:.1f} of {count}")
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    say(f"{saved.about['entry']}: {count} × {count}")
    console.print(table)
    if saved.features is not None and len(saved.features) > 1:
        found = kernels.inner_products(jnp.asarray(saved.features @ saved.features.T))
        positive = 1 - float(found.negative_share) - float(found.zero_share)
        say(
            f"pairs of features ⟨φ, φ'⟩: {float(found.negative_share):.1%} below 0, "
            f"{positive:.1%} above; mean cosine {float(found.cosine_mean):.3f}"
        )
    if saved.standard_error is not None:
        error = np.median(saved.standard_error / np.maximum(np.abs(saved.total), 1e-30))
        say(f"standard error of an entry's estimate (median): {error:.1%}")
    say(f"kernel: {path}")
    if count > 1:
        say(f"picture: {path.with_suffix('.png')}")
