"""What the model writes: the same prompts before and after training, side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from jaxdyn.report.load import Record, Run
from jaxdyn.report.plotting import Table, by_schedule, label

PROMPTS = 6
COMPLETIONS = 2
CHARACTERS = 700

RECORDED = ("prompt_index", "prompt", "completion", "reward", "finished")
COLUMNS = ("when", "schedule", "seed", "run", "step", *RECORDED)


@dataclass(frozen=True)
class Column:
    """A run's samples at one step: its heading, and its records by prompt."""

    heading: str
    when: str
    run: Run
    step: int
    by_prompt: dict[str, list[Record]]


def side_by_side(runs: Sequence[Run]) -> tuple[str, Table] | None:
    """An HTML table (a row a prompt) and its data; None if no run kept samples.

    Before: the first run's earliest samples. After: for each schedule its first run's latest. The
    prompts are spread evenly over those that all columns share, not chosen by their rewards.
    """
    columns = _columns([run for run in runs if run.samples])
    if not columns:
        return None
    shared = [p for p in columns[0].by_prompt if all(p in c.by_prompt for c in columns[1:])]
    if not shared:
        return None
    count = min(PROMPTS, len(shared))
    prompts = [shared[i * len(shared) // count] for i in range(count)]
    rows = [
        (
            *(column.when, column.run.schedule, column.run.seed, column.run.name, column.step),
            *(record.get(key) for key in RECORDED),
        )
        for prompt in prompts
        for column in columns
        for record in column.by_prompt[prompt][:COMPLETIONS]
    ]
    return _html(prompts, columns), Table(COLUMNS, rows)


def _columns(runs: Sequence[Run]) -> list[Column]:
    columns: list[Column] = []
    for schedule, group in by_schedule(runs).items():
        run = group[0]
        first, last = (choose(r["step"] for r in run.samples) for choose in (min, max))
        if not columns:
            columns.append(Column("Before training", "before", run, first, _at(run, first)))
        if last > first:
            heading = f"After {label(schedule)} (seed {run.seed}, step {last})"
            columns.append(Column(heading, "after", run, last, _at(run, last)))
    return columns


def _at(run: Run, step: int) -> dict[str, list[Record]]:
    chosen: dict[str, list[Record]] = {}
    for record in run.samples:
        if record["step"] == step and isinstance(record.get("prompt"), str):
            chosen.setdefault(record["prompt"], []).append(record)
    return chosen


def _html(prompts: Sequence[str], columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in columns)
    rows = []
    for prompt in prompts:
        cells = ("".join(map(_sample, c.by_prompt[prompt][:COMPLETIONS])) for c in columns)
        rows.append(
            f'<tr><td class="text">{_text(prompt)}</td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>\n"
        )
    return (
        f'<table class="samples"><thead><tr><th>Prompt</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _sample(record: Record) -> str:
    reward = record.get("reward")
    badge = f"reward {reward:.2f}" if isinstance(reward, int | float) else "no reward"
    if record.get("finished") is False:
        badge += ", cut off"
    return (
        f'<div class="sample"><span class="badge">{badge}</span>'
        f'<div class="text">{_text(record.get("completion"))}</div></div>'
    )


def _text(value: object) -> str:
    """Escaped text that shows control characters as \ufffd and says so if it is empty or cut."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", value if isinstance(value, str) else "")
    if not text.strip():
        return "<i>(empty)</i>"
    return escape(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …")
