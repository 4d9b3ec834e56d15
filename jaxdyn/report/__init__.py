"""From run directories to figures, tables and one HTML page; reads files and never touches JAX."""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxdyn.report.load import Run, load_run, load_runs

__all__ = ["Run", "load_run", "load_runs", "write_report"]


def write_report(
    run_directories: Sequence[str | Path], output_directory: str | Path | None = None
) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.csv` about all the runs together.

    `output_directory` is by default `report/` in the run's directory, or in the common parent of
    several. Returns the page's path.

    Raises JaxdynError if a directory is not a run, a file in it is malformed, or the report cannot
    be written.
    """
    from jaxdyn.report.page import write_page  # here, so that importing the room stays light

    directories = [Path(directory) for directory in run_directories]
    runs = load_runs(directories)
    return write_page(runs, Path(output_directory) if output_directory else _default(directories))


def _default(directories: list[Path]) -> Path:
    return Path(os.path.commonpath([directory.resolve() for directory in directories])) / "report"
