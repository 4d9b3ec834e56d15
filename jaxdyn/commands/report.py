"""`jaxdyn report`: one HTML page of figures and tables about one or more runs."""

from jaxdyn.commands.options import ReportOptions
from jaxdyn.paths import AnyPath
from jaxdyn.report import write_report


def run(options: ReportOptions) -> AnyPath:
    """Write the page, and return its path."""
    return write_report(options.runs, options.output)
