"""A run directory as a frozen `Run`, tolerant of what an aborted or older run lacks."""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.paths import AnyPath, absolute, common_parent, is_directory, open_path
from jaxdyn.storage.reading import Record, is_number, read_arrays, read_object, read_records

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
    calibration: list[Record]
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
        return read_arrays(self.probe_files[step])


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
    if not is_directory(directory):
        raise JaxdynError(f"{directory} is not a directory; a report needs a run's directory")
    path = directory / "config.json"
    if not path.is_file():
        raise JaxdynError(f"{directory} is not a run: it has no config.json")
    return Run(
        directory=directory,
        name=name or directory.name,
        config=read_object(path),
        metrics=_by_step(read_records(directory / "metrics.jsonl")),
        dynamics=_by_step(read_records(directory / "dynamics.jsonl")),
        samples=read_records(directory / "samples.jsonl"),
        temperatures=read_records(directory / "temperatures.jsonl"),
        calibration=_by_step(read_records(directory / "calibration.jsonl")),
        probe_files=_find_probes(directory / "dynamics"),
    )


def _by_step(records: list[Record]) -> list[Record]:
    last = {record["step"]: record for record in records}
    return [last[step] for step in sorted(last)]


def _find_probes(directory: AnyPath) -> dict[int, AnyPath]:
    number = re.compile(r"step_(-?\d{1,12})\.npz")
    matches = [(number.fullmatch(p.name), p) for p in directory.glob("*.npz")]
    files = dict(sorted((int(match[1]), path) for match, path in matches if match))
    if files:
        with files[max(files)].open("rb") as newest:
            whole = zipfile.is_zipfile(newest)
        if not whole:
            files.pop(max(files))  # cut short by a kill
    return files
