"""What the model writes: the same prompts before and after training, and at each temperature."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from jaxdyn.report.load import Record, Run, is_number
from jaxdyn.report.plotting import Exhibit, Rows, Table, by_schedule, look

PROMPTS = 6
PROMPTS_BY_TEMPERATURE = 2
COMPLETIONS = 2
CHARACTERS = 700

RECORDED = ("prompt_index", "prompt", "completion", "reward", "finished")
COLUMNS = ("when", "schedule", "seed", "run", "step", *RECORDED)
BY_TEMPERATURE_COLUMNS = ("temperature", *COLUMNS)


@dataclass(frozen=True)
class Column:
    """A run's samples at one step: its heading, and its records."""

    heading: str
    when: str
    run: Run
    step: int
    records: list[Record]

    @property
    def by_prompt(self) -> dict[str, list[Record]]:
        chosen: dict[str, list[Record]] = {}
        for record in self.records:
            if isinstance(record.get("prompt"), str):
                chosen.setdefault(record["prompt"], []).append(record)
        return chosen

    def at(self, temperature: float) -> "Column":
        """Of records that are temperature sweeps, the samples of one."""
        lines = [r for r in self.records if r.get("temperature") == temperature]
        kept = lines[-1].get("samples") if lines else None
        samples = [r for r in kept if isinstance(r, dict)] if isinstance(kept, list) else []
        return replace(self, records=samples)


def side_by_side(runs: Sequence[Run]) -> Exhibit | None:
    """A row a prompt; None if no run kept samples.

    Before: the first run's earliest samples. After: for each schedule its first run's latest. The
    prompts are spread evenly over those that all columns share, not chosen by their rewards.
    """
    columns = _columns(runs, lambda run: run.samples)
    prompts = _shared_prompts(columns, PROMPTS)
    if not prompts:
        return None
    rows = [row for prompt in prompts for row in _data(prompt, columns)]
    lines = [(f'<td class="text">{_text(prompt)}</td>', prompt, columns) for prompt in prompts]
    return Exhibit(
        name="samples",
        title="Samples",
        shows="Completions of the same evaluation prompts before and after training; the prompts "
        "are spread evenly over the file, not chosen by their rewards.",
        expects="If diversity falls as the paper leads one to expect, a prompt’s completions "
        "become more alike after training.",
        figure=_html("<th>Prompt</th>", columns, lines),
        tables={"samples": Table(COLUMNS, rows)},
    )


def by_temperature(runs: Sequence[Run]) -> Exhibit | None:
    """The same by prompt and temperature; None if no run sampled at several temperatures."""
    columns = _columns(runs, lambda run: run.temperatures)
    sampled = [
        {r["temperature"] for r in c.records if is_number(r.get("temperature"))} for c in columns
    ]
    temperatures = sorted(set.intersection(*sampled)) if sampled else []
    tables = [[column.at(t) for column in columns] for t in temperatures]
    prompts = _shared_prompts([c for table in tables for c in table], PROMPTS_BY_TEMPERATURE)
    if not prompts:
        return None
    rows, lines = [], []
    for prompt in prompts:
        for i, (temperature, table) in enumerate(zip(temperatures, tables, strict=True)):
            rows += [(temperature, *row) for row in _data(prompt, table)]
            span = f'<td class="text" rowspan="{len(temperatures)}">{_text(prompt)}</td>'
            name = f"{temperature:g}" if temperature else "0 (greedy)"
            lines.append((f"{'' if i else span}<td>{name}</td>", prompt, table))
    return Exhibit(
        name="samples_by_temperature",
        title="Samples by temperature",
        shows="Completions of evaluation prompts at each temperature that was sampled, before and "
        "after training, by the same random draws.",
        expects="A policy that training has made surer needs a higher temperature to vary as it "
        "did before.",
        figure=_html('<th>Prompt</th><th class="narrow">Temperature</th>', columns, lines),
        tables={"samples_by_temperature": Table(BY_TEMPERATURE_COLUMNS, rows)},
    )


def _columns(runs: Sequence[Run], records_of: Callable[[Run], list[Record]]) -> list[Column]:
    columns: list[Column] = []
    for schedule, group in by_schedule([run for run in runs if records_of(run)]).items():
        run, records = group[0], records_of(group[0])
        first, last = (choose(r["step"] for r in records) for choose in (min, max))
        at = {step: [r for r in records if r["step"] == step] for step in (first, last)}
        if not columns:
            columns.append(Column("Before training", "before", run, first, at[first]))
        if last > first:
            heading = f"After {look(schedule).label} (seed {run.seed}, step {last})"
            columns.append(Column(heading, "after", run, last, at[last]))
    return columns


def _shared_prompts(columns: Sequence[Column], wanted: int) -> list[str]:
    """Up to `wanted` of the prompts that all columns have, spread evenly."""
    if not columns:
        return []
    found = [column.by_prompt for column in columns]
    shared = [prompt for prompt in found[0] if all(prompt in other for other in found[1:])]
    count = min(wanted, len(shared))
    return [shared[i * len(shared) // count] for i in range(count)]


def _data(prompt: str, columns: Sequence[Column]) -> Rows:
    return [
        (
            *(column.when, column.run.schedule, column.run.seed, column.run.name, column.step),
            *(record.get(key) for key in RECORDED),
        )
        for column in columns
        for record in column.by_prompt[prompt][:COMPLETIONS]
    ]


def _html(
    heads: str, columns: Sequence[Column], lines: Sequence[tuple[str, str, Sequence[Column]]]
) -> str:
    """A table below `heads` and the columns'; a line is its first cells, prompt, columns."""
    heads += "".join(f"<th>{escape(column.heading)}</th>" for column in columns)
    rows = []
    for cells, prompt, table in lines:
        samples = ("".join(map(_sample, c.by_prompt[prompt][:COMPLETIONS])) for c in table)
        rows.append(f"<tr>{cells}{''.join(f'<td>{cell}</td>' for cell in samples)}</tr>\n")
    return (
        f'<table class="samples"><thead><tr>{heads}</tr></thead>\n'
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
