"""The whole story in a few minutes: a small model, supervised, then RL both ways, then the report.

Writes under one directory: `new` (a random Pythia-like model), `sft`, `joint` and
`classifier_first` (run directories), `ledger` (what the two did, with a page of every token), and
`report`. Started again, it goes on where it stopped.
"""

import dataclasses
import json
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jaxdyn.commands import ledger
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.commands.output import BLOCKS, refuse_others
from jaxdyn.data import AnagramsConfig, character_tokenizer
from jaxdyn.models import LanguageModel
from jaxdyn.models.shapes import SHAPES
from jaxdyn.optim import Schedule
from jaxdyn.presets import RL, SFT
from jaxdyn.report import load_run, write_report
from jaxdyn.report.ledger_file import load_ledger
from jaxdyn.sections import ModelSource
from jaxdyn.storage.files import write_file
from jaxdyn.storage.paths import AnyPath
from jaxdyn.train import Progress, open_run, run_rl, run_sft
from jaxdyn.train.export import save_policy

SCHEDULES: tuple[Schedule, ...] = ("joint", "classifier_first")
LEDGER_PROMPTS = 32


def quickstart(output: str | Path, seed: int = 0) -> AnyPath:
    """Run it all; prints a short table and returns the report's path.

    Raises:
      JaxdynError: if the output holds anything but a quickstart of the same seed.
    """
    progress, output = Progress(), Path(output)
    new = output / "new"
    sft = dataclasses.replace(
        SFT["quickstart"], output=str(output / "sft"), seed=seed, model=ModelSource(str(new))
    )
    refuse_others(output, {"new", "sft", *SCHEDULES, "ledger", "report"})
    if not (output / "sft" / "config.json").exists():
        make_model(new, sft.data.anagrams, seed)
    model = run_sft(sft, progress)
    runs, base = [], RL["quickstart"]
    for schedule in SCHEDULES:
        where, source = str(output / schedule), ModelSource(str(model))
        optim = dataclasses.replace(base.optim, schedule=schedule)
        config = dataclasses.replace(base, output=where, seed=seed, model=source, optim=optim)
        runs.append(run_rl(config, progress))
    for run in runs:
        write_ledger(str(model), run, output / "ledger", progress)
    page = write_report(runs, output / "report")
    print_summary(runs)
    return page


def write_ledger(before: str, run: AnyPath, directory: Path, progress: Progress) -> None:
    """The ledger of a run, at held-out prompts that the model before and after it completes."""
    output = directory / run.name
    if (output / "ledger.npz").exists() and not (output / BLOCKS).exists():
        load_ledger(output / "ledger.npz")  # it is whole, or says what it is not
        return
    with open_run(run) as saved:
        examples = saved.task.test[:LEDGER_PROMPTS]
    prompts = directory / "prompts.jsonl"
    lines = [json.dumps({"prompt": example["prompt"]}) for example in examples]
    write_file(prompts, "".join(line + "\n" for line in lines))
    options = LedgerOptions(
        (before, str(run)),
        prompts=str(prompts),
        output=str(output),
        sample="both",
        limit=LEDGER_PROMPTS,
        max_completion_length=8,
        by_token=("log_prob", "entropy"),
    )
    ledger.run(options, progress)


def make_model(directory: Path, data: AnagramsConfig, seed: int) -> None:
    """A random model of the Pythia architecture, 0.4 million parameters, and its tokenizer."""
    tokenizer = character_tokenizer(data.letters + "=")
    shape = dataclasses.replace(SHAPES["quickstart"], vocab_size=tokenizer.vocab_size)
    model = LanguageModel(shape)
    params = model.init(jax.random.key(seed))
    save_policy(directory, model, params, tokenizer)


def print_summary(runs: list[AnyPath]) -> None:
    """Reward, diversity and certainty on held-out prompts, a row a run."""
    table = Table(
        title="held-out prompts, before → after RL", box=box.SIMPLE_HEAD, collapse_padding=True
    )
    for column in ("run", "reward", "unique", "entropy", "confidence", "time"):
        table.add_column(column)
    for path in runs:
        lines = load_run(path).metrics
        first, last = lines[0], lines[-1]
        names = ("reward", "diversity/unique", "entropy", "confidence/max_prob")
        cells = [f"{first[f'eval_{x}']:.2f} → {last[f'eval_{x}']:.2f}" for x in names]
        table.add_row(path.name, *cells, f"{last['time/wall']:.0f} s")
    Console().print(table)
