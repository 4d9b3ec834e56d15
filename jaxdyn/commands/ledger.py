"""`jaxdyn ledger`: what the training between two or more checkpoints did, as a file and a page.

Writes `ledger.npz`, which `jaxdyn.report.ledger_file.load_ledger` reads without a model,
`ledger.json` with what it adds up to, and `ledger.html`, where every token can be looked at. What
is finished is kept in `blocks` until then, so that a killed command goes on when it is given again.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxdyn
from jaxdyn.commands.checkpoints import Checkpoints, open_checkpoints
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.commands.ledger_texts import LedgerTexts, texts_of, token_pieces
from jaxdyn.commands.output import BLOCKS, finish, is_finished, refuse_finished, tidy
from jaxdyn.commands.text_options import bytes_of
from jaxdyn.dynamics import Ledger, ledger, most_changed_tokens
from jaxdyn.dynamics.observables import SMOOTH
from jaxdyn.report.ledger_file import SavedLedger, load_ledger, summarize_ledger
from jaxdyn.report.microscope import microscope_pages
from jaxdyn.storage.files import naming
from jaxdyn.train.progress import Progress
from jaxdyn.types import Sites


def run(options: LedgerOptions, progress: Progress | None = None) -> Path:
    """Compute the ledger, write it, print a summary; returns the file's path.

    Raises:
      JaxdynError: naming what does not fit: the output, the checkpoints, the prompts, the options.
    """
    progress = progress or Progress()
    say = lambda text: progress.console.print(text, highlight=False, soft_wrap=True, markup=False)
    output = Path(options.output)
    path = output / "ledger.npz"
    pages = {page.name for page in output.glob("ledger*.html")}
    refuse_finished(output, {"ledger.json", "ledger.npz", *pages})
    if is_finished(path, options, lambda there: load_ledger(there).about):
        tidy(output)
        print_summary(load_ledger(path))
        return path
    float64 = options.dtype == "float64"
    dtype = np.float64 if float64 else np.float32
    with jax.enable_x64(float64), open_checkpoints(options.checkpoints, dtype) as checkpoints:
        for name in checkpoints.strangers:
            first = checkpoints.names[0]
            say(f"the tokenizer of {name} differs from that of {first}, which reads the texts")
        texts, more = texts_of(options, checkpoints)
        if more:
            say(f"the first {options.limit} lines of {options.prompts}; --limit 0 takes all")
        count = len(checkpoints.names)
        say(f"ledger of {count} checkpoints at {len(texts.pieces)} tokens")
        with naming(output):
            (output / BLOCKS).mkdir(parents=True, exist_ok=True)
        found, ids = compute(options, checkpoints, texts, progress)
        saved = to_save(options, checkpoints, texts, found, ids)
    summary = json.dumps(summarize_ledger(saved), indent=1, ensure_ascii=False)
    shown = microscope_pages(saved, output / "ledger.html")
    finish(output, {output / "ledger.json": summary + "\n", **shown, path: saved.packed()})
    print_summary(saved)
    others = f" and {len(shown) - 1} more" if len(shown) > 1 else ""
    say(f"every token: {output / 'ledger.html'}{others}")
    return path


def compute(
    options: LedgerOptions, checkpoints: Checkpoints, texts: LedgerTexts, progress: Progress
) -> tuple[Ledger, np.ndarray]:
    """The ledger, and the other tokens that it follows [N, A]."""
    model, budget = checkpoints.model, bytes_of(options.memory_budget)
    ids = np.zeros((len(texts.pieces), 0), np.int32)
    if options.alternatives:
        first, last = checkpoints[0], checkpoints[-1]
        ids = most_changed_tokens(model, first, last, texts.sites, options.alternatives, budget)
        del first, last
    with progress.tiles("ledger, texts") as report:
        found = ledger(
            model,
            checkpoints,
            texts.sites,
            token_ids=ids,
            through=options.through,
            by_layer=options.layered,
            by_token=options.by_token,
            tolerance=options.tolerance,
            memory_budget=budget,
            progress=report,
            blocks=Path(options.output) / BLOCKS,
        )
    return found, ids


def to_save(
    options: LedgerOptions,
    checkpoints: Checkpoints,
    texts: LedgerTexts,
    found: Ledger,
    ids: np.ndarray,
) -> SavedLedger:
    """Everything needed to read the ledger again, as host arrays."""
    sites = {f.name: np.asarray(getattr(texts.sites, f.name)) for f in dataclasses.fields(Sites)}
    return SavedLedger(
        **sites,
        prompts=np.array(texts.prompts, np.str_),
        pieces=np.array(texts.pieces, np.str_),
        names=np.array(checkpoints.names, np.str_),
        nodes=found.nodes,
        alternatives=ids,
        alternative_pieces=token_pieces(checkpoints.tokenizer, ids),
        alternative_values=found.token_values,
        alternative_parts=found.token_parts,
        values=found.values,
        parts=found.parts,
        by_layer=found.by_layer,
        by_token=found.by_token,
        about={
            "jaxdyn": jaxdyn.__version__,
            "writers": texts.writers,
            "model": dataclasses.asdict(checkpoints.model.config),
            "config": dataclasses.asdict(options),
        },
    )


def print_summary(saved: SavedLedger) -> None:
    """What changed on average, and through which component."""
    found = summarize_ledger(saved)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "change", "representation", "gradient", "share of repr.", "residual"):
        table.add_column(column, justify="right" if column else "left")
    for name, of in found["quantities"].items():
        low, high = of["representation_share_interval"]
        table.add_row(
            name,
            f"{of['change']:+.4f}",
            f"{of['representation']:+.4f}",
            f"{of['gradient']:+.4f}",
            f"{of['representation_share']:.1%} ({low:.1%} to {high:.1%})",
            f"{of['residual']:.1e}",
        )
    console = Console()
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    say(f"from {saved.names[0]} to {saved.names[-1]}: means over {found['sites']} tokens")
    console.print(table)
    say(
        "share: of the changes' sum of squares over tokens, with an interval over texts; residual: "
        "rms, relative to the rms change"
    )
    how = saved.about["config"]
    above = [name for name in SMOOTH if found["quantities"][name]["residual"] > how["tolerance"]]
    if above and how["dtype"] == "float32":
        say(
            f"{', '.join(above)}: above the tolerance of {how['tolerance']:g}; where a change is "
            "small it is float32's rounding of the two ends, 1e-5 nats or so, and --dtype float64 "
            "has none of it"
        )
