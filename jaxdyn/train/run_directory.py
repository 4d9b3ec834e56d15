"""A run's directory: its configuration, and what it writes as it goes.

Lines are appended and flushed a step at a time. A run that was killed and starts again first drops
every line from its checkpoint's step on, so that the finished files are those of a run never
interrupted.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from jaxdyn.config import load_config, save_config
from jaxdyn.types import JaxdynError

LOGS = (
    "metrics.jsonl",
    "dynamics.jsonl",
    "samples.jsonl",
    "completions.jsonl",
    "temperatures.jsonl",
)


class RunDirectory:
    """The directory of one run, opened with the run's configuration.

    Raises:
      JaxdynError: if the directory holds a run of another configuration, or other files.
    """

    def __init__(self, path: str | Path, config: Any):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.dynamics = self.path / "dynamics"
        saved = self.path / "config.json"
        if saved.exists():
            earlier = load_config(type(config), saved)
            if earlier != config:
                raise JaxdynError(
                    f"{self.path} already holds another run ({differences(earlier, config)}); "
                    "choose another output"
                )
        partial = saved.with_suffix(".partial")
        if not saved.exists():
            if self.path.is_dir() and set(self.path.iterdir()) - {partial}:
                raise JaxdynError(
                    f"{self.path} is not empty and holds no run; choose another output"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, partial)
            partial.replace(saved)
        self.dynamics.mkdir(exist_ok=True)
        self._board: SummaryWriter | None = None

    def rewind(self, step: int) -> None:
        """Forget everything logged at `step` or later."""
        for name in LOGS:
            path = self.path / name
            if path.exists():
                # A text may hold other line separators, and a killed run half a character.
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                kept = [line for line in lines if _before(line, step)]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                partial.replace(path)
        for path in self.dynamics.glob("step_*.npz"):
            if int(path.stem.removeprefix("step_")) >= step:
                path.unlink()
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=max(step, 0))

    def log(self, name: str, *records: dict[str, Any]) -> None:
        """Append records to a log, all on disk at return; scalars also go to TensorBoard."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        if name in ("metrics.jsonl", "dynamics.jsonl") and self._board is not None:
            for record in records:
                for key, value in record.items():
                    if isinstance(value, int | float) and key != "step":
                        self._board.add_scalar(key, value, record["step"])

    def save_arrays(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """The per-site arrays of a probed step."""
        path = self.dynamics / f"step_{step:06d}.npz"
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except (json.JSONDecodeError, KeyError):
        return False  # the half-written last line of a killed run


def differences(a: Any, b: Any, prefix: str = "") -> str:
    """The first few fields in which two configurations differ, for an error message."""
    found = []
    for field in dataclasses.fields(a):
        old, new = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(old):
            inner = differences(old, new, f"{prefix}{field.name}.")
            found += [inner] if inner else []
        elif old != new:
            found.append(f"{prefix}{field.name}: {old!r} there, {new!r} here")
    return "; ".join(found[:3])
