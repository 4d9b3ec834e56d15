"""What the scripts of claims share: their arguments, their subject, and how a finding is kept.

A script answers one claim about one model. It writes NAME.json (the verdict, the rows it rests on,
and how it was made), NAME.png, and leaves both alone if they are there already.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import matplotlib.pyplot as plt
import numpy as np
from inference import bootstrap, sign_flip

from jaxdyn.storage.files import write_file

Size = Literal["toy", "brief", "small", "full"]
T = TypeVar("T")
Ruling = Literal["supported", "not supported", "undecided"]

# Okabe and Ito (2008): told apart by all forms of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of a claim on one model.

    Attributes:
      claim: the claim, in a sentence that could be false.
      ruling: supported, not supported or undecided.
      statistic: what was measured, in words, with its unit.
      value, low, high: it, with its 95 % interval.
      over: what the interval is over, with how many: "12 pairs of seeds", "256 sites".
      seeds: how many trainings it rests on; no verdict comes from one.
      p: of the two-sided exact test, where there is one.
      note: one or two sentences on what was seen and what it does not say.
    """

    claim: str
    ruling: Ruling
    statistic: str
    value: float
    low: float
    high: float
    over: str
    seeds: int
    p: float | None = None
    note: str = ""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every claim's script takes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--model", type=Path, help="the model before RL, in the Hugging Face layout")
    found.add_argument("--runs", type=Path, help="what experiments/trainings.py wrote: ARM/SEED")
    found.add_argument("--size", choices=get_args(Size), default="small")
    found.add_argument("--name", default="model", help="of the model, in titles")
    found.add_argument("--output", type=Path, default=Path("experiments/results/findings"))
    return found


def of_size(sizes: dict[str, T], size: str) -> T:
    """What a script does at a size: "brief", for models that are slow to ask, is "small" where
    nothing else is said."""
    return sizes.get(size, sizes["small"])


def trainings(runs: Path, arm: str) -> list[Path]:
    """The run directories of an arm, in the order of their seeds."""
    return sorted((runs / arm).iterdir(), key=lambda path: int(path.name.removeprefix("seed-")))


def arms(runs: Path) -> list[str]:
    """The arms that were trained."""
    return sorted(path.name for path in runs.iterdir() if any(path.glob("seed-*/config.json")))


def compared(
    claim: str,
    statistic: str,
    differences: Sequence[float],
    matters: float,
    over: str = "pairs of seeds",
    note: str = "",
) -> Verdict:
    """What the differences of paired trainings say of a claim that they are positive.

    Supported if the 95 % interval of their mean (bootstrap over seeds) lies above 0 and the exact
    sign flip has p < 0.05. Not supported if both hold below 0, or if the interval, of six pairs at
    least, lies within ±`matters`, the smallest difference that would matter. Else undecided.
    """
    values = np.asarray(differences, np.float64)
    mean, p, pairs = float(values.mean()), sign_flip(values), len(values)
    low, high = bootstrap(values)
    ruling: Ruling = "undecided"
    if p < 0.05 and low > 0:
        ruling = "supported"
    elif (p < 0.05 and high < 0) or (pairs >= 6 and -matters < low and high < matters):
        ruling = "not supported"
    return Verdict(claim, ruling, statistic, mean, low, high, f"{pairs} {over}", pairs, p, note)


def plain(value: Any) -> Any:
    """`value` as JSON holds it; floats with six digits, which is more than any of them means."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def keep(
    chosen: argparse.Namespace,
    script: str,
    find: Callable[[argparse.Namespace], tuple[Sequence[Verdict], Any, plt.Figure]],
) -> Path:
    """Ask `find` for verdicts, rows and a figure, unless the answer is there; returns its JSON.

    `rows` is what the verdicts can be computed from again: where the script has `verdicts(rows)`,
    it is asked again with the rows as they are kept, so that who reads them comes to the same.
    """
    directory = chosen.output / chosen.name
    answer = directory / f"{script}.json"
    if answer.exists():
        print(f"{answer} is there")
        return answer
    verdicts, rows, figure = find(chosen)
    rows = plain(rows)
    judge = getattr(sys.modules[find.__module__], "verdicts", None)
    verdicts = judge(rows) if judge else verdicts
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"{script}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    content = {
        "script": script,
        "model": chosen.name,
        "size": chosen.size,
        "verdicts": [plain(dataclasses.asdict(verdict)) for verdict in verdicts],
        "rows": rows,
    }
    write_file(answer, json.dumps(content, indent=1) + "\n")
    for verdict in verdicts:
        print(
            f"{verdict.ruling}: {verdict.claim}\n  {verdict.statistic}: {verdict.value:.3g} "
            f"({verdict.low:.3g} to {verdict.high:.3g}), {verdict.over}"
        )
    return answer
