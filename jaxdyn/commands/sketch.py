"""`jaxdyn sketch`: sketches of many gradients, in one file that is filled as they are found.

A killed command goes on where it was when it is given again.
"""

import dataclasses
from pathlib import Path

import jax

import jaxdyn
from jaxdyn import kernels
from jaxdyn.commands.kernel import read_file, texts_of
from jaxdyn.commands.kernel_places import completion_places, prompt_places
from jaxdyn.commands.kernel_subject import open_subject
from jaxdyn.commands.output import is_finished, refuse_others
from jaxdyn.commands.sketch_options import SketchOptions
from jaxdyn.commands.text_options import bytes_of
from jaxdyn.storage.files import size
from jaxdyn.train.progress import Progress

FILE = "sketches.safetensors"


def run(options: SketchOptions, progress: Progress | None = None) -> Path:
    """Sketch the gradients and write them; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the texts, the model, the options.
    """
    progress = progress or Progress()
    output = Path(options.output)
    path = output / FILE
    refuse_others(output, {FILE})
    if is_finished(path, options, lambda there: kernels.open_sketches(there).about):
        return path
    examples = read_file(options, progress)
    with jax.enable_x64(options.dtype == "float64"):
        subject = open_subject(options)
        texts = texts_of(options, examples, subject.tokenizer)
        if texts.completions is None:
            places = prompt_places(options, subject, texts)
        else:
            places = completion_places(options, subject, texts, with_features=False)
        about = {
            "jaxdyn": jaxdyn.__version__,
            "quantity": options.quantity,
            "targets": places.targets,
            "model": {"name": subject.name, "step": subject.step, "dtype": options.dtype},
            "config": dataclasses.asdict(options),
        }
        with progress.tiles("sketches, batches") as report:
            kernels.store_sketches(
                path,
                subject.model,
                subject.params,
                places.sites if places.rollout is None else places.rollout,
                jax.random.key(options.seed),
                texts={"context": places.contexts, "target": places.target_texts},
                about=about,
                preconditioner=subject.preconditioner,
                replicates=options.replicates,
                side=options.side,
                memory_budget=bytes_of(options.memory_budget),
                progress=report,
            )
    if jax.process_index() == 0:
        what = "completions" if places.rollout is not None else "sites"
        print(f"{len(places.contexts)} {what}, {size(path.stat().st_size)}")
    return path
