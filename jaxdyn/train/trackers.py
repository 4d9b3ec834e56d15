"""Where a run's scalars go beside its own files: TensorBoard, Trackio, Weights & Biases.

The last two have the same surface, `init(...)` to a run with `log` and `finish`; of each, what its
own environment variables say holds (`WANDB_MODE=offline`, `TRACKIO_SPACE_ID`, the project). A run
that was stopped goes on under the same name. What it computes again it logs again: the same
numbers at the same steps.
"""

import dataclasses
import importlib
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.files import write_file
from jaxdyn.storage.paths import AnyPath, one_line
from jaxdyn.train.board import Board

PACKAGES = {"trackio": "trackio", "wandb": "wandb"}
"""What a tracker needs installed, which is the name of its extra too."""


class Remote:
    """A run of Trackio's or of Weights & Biases'."""

    def __init__(self, package: str, config: Any, directory: Path, name: str, identity: str):
        self._steps = package == "wandb"
        told: dict[str, Any] = {
            "project": os.environ.get(f"{package.upper()}_PROJECT", "jaxdyn"),
            "name": f"{name}-{identity}",
            "config": dataclasses.asdict(config),
            "resume": "allow",
        }
        if self._steps:
            told |= {"id": identity, "dir": str(directory)}
        try:
            self._run = importlib.import_module(package).init(**told)
        except Exception as error:  # each has kinds of its own
            raise JaxdynError(
                f"train.trackers: {package} would not begin: {one_line(error)}"
            ) from error
        if self._steps:
            # Its own count may neither go back nor begin at -1.
            self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, int | float]) -> None:
        if self._steps:
            self._run.log({"step": step, **scalars})
        else:
            self._run.log(scalars, step=step)

    def flush(self) -> None:
        """It sends as it is told."""

    def close(self) -> None:
        self._run.finish()


Tracker = Board | Remote


def require_trackers(names: tuple[str, ...]) -> None:
    """That what they need is installed; JaxdynError naming the extra if not."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise JaxdynError(
                f"train.trackers names {name}, which is not installed: pip install 'jaxdyn[{name}]'"
            )


def open_trackers(
    config: Any, written: AnyPath, directory: Path, name: str, step: int
) -> list[Tracker]:
    """The run's trackers (`train.trackers`), from `step` on.

    Args:
      written: the run's directory, which may be in a bucket.
      directory: where its files are written.

    Raises:
      JaxdynError: if one would not begin.
    """
    chosen = config.train.trackers
    board: list[Tracker] = (
        [Board(directory / "tensorboard", max(step, 0))] if "tensorboard" in chosen else []
    )
    packages = [PACKAGES[tracker] for tracker in chosen if tracker in PACKAGES]
    identity = _identity(written, directory) if packages else ""
    return board + [Remote(package, config, directory, name, identity) for package in packages]


def _identity(written: AnyPath, directory: Path) -> str:
    """What a run is called there: drawn at its first start, and kept in its directory."""
    kept = written / "tracker.txt"
    if kept.exists():
        return kept.read_text().strip()
    drawn = uuid.uuid4().hex[:8]
    write_file(directory / "tracker.txt", drawn + "\n")
    return drawn
