"""From run directories to figures, tables and one HTML page; reads files and never touches JAX."""

from collections.abc import Sequence

from jaxdyn.report.load import Run, load_run, load_runs
from jaxdyn.storage.paths import AnyPath, absolute, common_parent, open_path


def write_report(runs: Sequence[str | AnyPath], output: str | AnyPath | None = None) -> AnyPath:
    """Write `report.html`, `figures/*.png` and `tables/*.csv` about all the runs together.

    `output` is by default `report/` in the run's directory, or in the common parent of
    several. Returns the page's path.

    Raises JaxdynError if a directory is not a run, a file in it is malformed, or the report cannot
    be written.
    """
    from jaxdyn.report.page import write_page  # here, so that importing the room stays light

    directories = [absolute(open_path(directory)) for directory in runs]
    where = open_path(output or common_parent(directories) / "report")
    return write_page(load_runs(directories), where)
