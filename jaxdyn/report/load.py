"""A run directory as a frozen `Run`, tolerant of what an aborted or older run lacks."""

import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.paths import AnyPath, absolute, common_parent, open_path

Record = dict[str, Any]

CLASSIFIER_STAGE = 1  # the value of "cfrl/stage" while only the classifier is trained


@dataclass(frozen=True)
class Run:
    """One training run: its settings, its logged numbers by step, its samples and probe files."""

    directory: AnyPath
    name: str
    config: Record
    metrics: list[Record]
    dynamics: list[Record]
    samples: list[Record]
    temperatures: list[Record]
    probe_files: dict[int, AnyPath]

    @property
    def schedule(self) -> str:
        """joint, classifier_first, classifier_only, joint_extra, or what the config says."""
        optim = self.config.get("optim")
        return str(optim.get("schedule", "unknown")) if isinstance(optim, dict) else "unknown"

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def steps(self) -> int:
        """RL steps logged."""
        return sum(record["step"] >= 0 for record in self.metrics)

    @property
    def probed(self) -> int:
        """Updates whose effect on the probe sites was measured."""
        return sum(record["step"] >= 0 for record in self.dynamics)

    def series(self, key: str) -> dict[int, float]:
        """A logged number by step, from whichever log has it; what is not finite is left out."""
        for records in (self.metrics, self.dynamics):
            values = {r["step"]: float(r[key]) for r in records if is_number(r.get(key))}
            if values:
                return values
        return {}

    def classifier_steps(self) -> int:
        """How many steps trained the classifier alone before all parameters; 0 if never both."""
        stages = self.series("cfrl/stage")
        first = [step for step, stage in stages.items() if stage == CLASSIFIER_STAGE]
        return max(first) + 1 if 0 < len(first) < len(stages) else 0

    def in_classifier_stage(self, step: int) -> bool:
        """Whether the update of this step moved the classifier alone."""
        return any(
            r["step"] == step and r.get("cfrl/stage") == CLASSIFIER_STAGE
            for r in (*self.dynamics, *self.metrics)
        )

    def probe(self, step: int) -> dict[str, np.ndarray]:
        """The arrays over probe sites saved at a step."""
        path = self.probe_files[step]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise JaxdynError(f"{path} is not a readable file of arrays: {error}") from error


def load_runs(directories: Sequence[AnyPath]) -> list[Run]:
    """Runs sorted by schedule and seed, named by their paths below the common parent."""
    paths = list(dict.fromkeys(absolute(directory) for directory in directories))
    if not paths:
        raise JaxdynError("a report needs at least one run directory, got none")
    parent = common_parent(paths) if len(paths) > 1 else paths[0].parent
    runs = [load_run(path, path.relative_to(parent).as_posix()) for path in paths]
    return sorted(runs, key=lambda run: (run.schedule, run.seed or 0, run.name))


def load_run(directory: str | AnyPath, name: str | None = None) -> Run:
    """Read a run directory; raises JaxdynError if it is not one or a line in it is malformed.

    Missing files count as empty. A last line or probe file cut short by a kill is ignored; a step
    that was logged twice, before and after a restart, counts as logged last.
    """
    directory = open_path(directory)
    if not directory.is_dir():
        raise JaxdynError(f"{directory} is not a directory; a report needs a run's directory")
    path = directory / "config.json"
    if not path.is_file():
        raise JaxdynError(f"{directory} is not a run: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JaxdynError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise JaxdynError(f"{path} must hold an object, got {type(config).__name__}")
    return Run(
        directory=directory,
        name=name or directory.name,
        config=config,
        metrics=_by_step(_read_lines(directory / "metrics.jsonl")),
        dynamics=_by_step(_read_lines(directory / "dynamics.jsonl")),
        samples=_read_lines(directory / "samples.jsonl"),
        temperatures=_read_lines(directory / "temperatures.jsonl"),
        probe_files=_find_probes(directory / "dynamics"),
    )


def _read_lines(path: AnyPath) -> list[Record]:
    """The objects of a JSONL file, each with an integer "step"."""
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise JaxdynError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise JaxdynError(
                f'{path}, line {number} must be an object with an integer "step", got {line[:60]}'
            )
        records.append(record)
    return records


def _by_step(records: list[Record]) -> list[Record]:
    last = {record["step"]: record for record in records}
    return [last[step] for step in sorted(last)]


def _find_probes(directory: AnyPath) -> dict[int, AnyPath]:
    matches = [(re.fullmatch(r"step_(-?\d+)\.npz", p.name), p) for p in directory.glob("*.npz")]
    files = dict(sorted((int(match[1]), path) for match, path in matches if match))
    if files:
        with files[max(files)].open("rb") as newest:
            whole = zipfile.is_zipfile(newest)
        if not whole:
            files.pop(max(files))  # cut short by a kill
    return files


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
