"""`jaxdyn analyze`: what the updates of a finished run did, recomputed from its checkpoints."""

from jaxdyn.commands.options import AnalyzeOptions
from jaxdyn.paths import AnyPath, open_path
from jaxdyn.train import analyze


def run(options: AnalyzeOptions) -> AnyPath:
    """Measure, and return the directory that was written."""
    path = open_path(options.run)
    return analyze(path, open_path(options.output or path / "analysis"))
