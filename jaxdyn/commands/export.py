"""`jaxdyn export`: a run's model as a Hugging Face directory."""

from jaxdyn.commands.options import ExportOptions
from jaxdyn.paths import AnyPath, open_path
from jaxdyn.train import export


def run(options: ExportOptions) -> AnyPath:
    """Write the model, and return its directory."""
    return export(open_path(options.run), open_path(options.output), options.step)
