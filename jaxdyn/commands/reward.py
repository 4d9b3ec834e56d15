"""`jaxdyn reward score`: a file's rows with their scores, and what pairs say of the model."""

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
from rich.console import Console

from jaxdyn.commands.reward_options import ScoreOptions
from jaxdyn.data import DataConfig, JsonlFile
from jaxdyn.data.examples import PAIR, Example, example_of
from jaxdyn.data.files import rows_of
from jaxdyn.distributed import Layout, make_mesh
from jaxdyn.dynamics.calibration import preference_measures
from jaxdyn.dynamics.sampling import mean_with_interval
from jaxdyn.rewards import LearnedReward
from jaxdyn.storage.files import write_file
from jaxdyn.storage.paths import AnyPath, open_path
from jaxdyn.train.scorer import Scorer
from jaxdyn.train.task import open_scorer
from jaxdyn.types import JaxdynError

FIELDS = {"completion": "score", "chosen": "score_chosen", "rejected": "score_rejected"}
"""What is scored, and what its score is called."""


def run(options: ScoreOptions) -> AnyPath:
    """Read, score, print and write; returns the file's path.

    Raises:
      JaxdynError: for a file or a row that cannot be read, or holds nothing to score; for a model
        that is none; if the output exists.
    """
    path = open_path(options.output)
    if path.exists():
        raise JaxdynError(f"{path} already exists; choose another --output")
    examples = read(options)
    scorer = open_model(options)
    places = [(i, name) for i, example in enumerate(examples) for name in answers_of(example)]
    rows = [scorer.read(examples[i]["prompt"], examples[i][name]) for i, name in places]
    lines: list[dict[str, Any]] = [{**example} for example in examples]
    lengths = {}
    for (i, name), row, score in zip(places, rows, scorer.score(rows), strict=True):
        lines[i][FIELDS[name]] = score
        lengths[i, name] = len(row)
    pairs = [
        (line["score_chosen"] - line["score_rejected"], lengths[i, PAIR[0]] - lengths[i, PAIR[1]])
        for i, line in enumerate(lines)
        if None not in (line.get("score_chosen"), line.get("score_rejected"))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(path, text)
    say(lines, pairs)
    return path


def read(options: ScoreOptions) -> list[Example]:
    """The file's examples, each with a completion or a pair."""
    file = JsonlFile(options.file, options.prompt_field)
    examples = []
    for row, where in itertools.islice(rows_of(file.path), options.limit or None):
        example = example_of(row, file, where)
        if not all(isinstance(example.get(name), str) for name in answers_of(example)):
            raise JaxdynError(
                f"{where} has nothing to score: wanted 'completion', or 'chosen' and 'rejected'; "
                f"it has {', '.join(row)}"
            )
        examples.append(example)
    return examples


def answers_of(example: Example) -> tuple[str, ...]:
    """The fields that hold what is scored."""
    return PAIR if all(name in example for name in PAIR) else ("completion",)


def open_model(options: ScoreOptions) -> Scorer:
    """The reward model, on the options' mesh."""
    left = open_path(options.model) / "model"
    names = {field.name for field in dataclasses.fields(LearnedReward)} - {"path"}
    told = {name: getattr(options, name) for name in names}
    learned = LearnedReward(path=str(left) if left.is_dir() else options.model, **told)
    data = DataConfig(template_date=options.template_date)
    return open_scorer("model", learned, data, Layout(make_mesh(options.mesh)))


def say(lines: list[dict[str, Any]], pairs: list[tuple[float, int]]) -> None:
    """The mean score, and of pairs how well it foresees them."""
    print_line = lambda text: Console().print(text, soft_wrap=True, highlight=False, markup=False)
    scores = [line["score"] for line in lines if line.get("score") is not None]
    if scores:
        mean, low, high = mean_with_interval(np.array(scores))
        print_line(f"{len(scores)} completions: score {interval(mean, low, high)}")
    if pairs:
        margins, longer = (np.array(column) for column in zip(*pairs, strict=True))
        found = preference_measures(margins, longer)
        print_line(f"{len(pairs)} pairs")
        for name, words in SHOWN.items():
            ends = (found.get(f"{name}_ci_{end}", math.nan) for end in ("low", "high"))
            print_line(f"  {words:<34}{interval(found[name], *ends)}")
    if unscored := sum(line.get(name, 0) is None for line in lines for name in FIELDS.values()):
        print_line(f"{unscored} answers are too long and have no score")


SHOWN = {
    "accuracy": "accuracy",
    "length_accuracy": "of preferring the longer answer",
    "accuracy_over_length": "difference",
    "nll": "−log σ(margin), nats",
    "ece": "expected calibration error",
}


def interval(mean: float, low: float, high: float) -> str:
    """A value with its 95 % interval, if it has one."""
    return f"{mean:.3f}" + ("" if math.isnan(low) else f"  [{low:.3f}, {high:.3f}]")
