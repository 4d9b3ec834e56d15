"""One self-contained HTML page with the summary, the figures and the samples."""

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure

from jaxdyn.errors import JaxdynError
from jaxdyn.report import (
    figures,
    preference_figures,
    samples,
    sampling_figures,
    summary,
    update_figures,
)
from jaxdyn.report.load import Run
from jaxdyn.report.plotting import STYLE, Exhibit
from jaxdyn.report.policy import content_policy
from jaxdyn.storage.files import require_writable, write_files
from jaxdyn.storage.paths import AnyPath

PAPER = "https://arxiv.org/abs/2601.04670"

EXHIBITS = (
    preference_figures.preferences,
    figures.reward,
    figures.confidence,
    sampling_figures.sampling,
    update_figures.prediction,
    update_figures.shares,
    update_figures.ledger,
    update_figures.features,
    figures.distance,
    samples.side_by_side,
    samples.by_temperature,
)

CSS = """
body { font: 16px/1.5 "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
       color: #1a1a1a; background: #fff; max-width: 1120px; margin: 32px auto; padding: 0 24px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 22px; margin: 44px 0 6px; border-top: 1px solid #ddd; padding-top: 20px; }
p, ul { max-width: 860px; margin: 8px 0; } ul { padding-left: 20px; } li { margin: 4px 0; }
.lead { font-size: 17px; color: #444; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; max-width: 980px; }
dt { font-weight: 600; } dd { margin: 0; }
table { border-collapse: collapse; margin: 14px 0; font-size: 14.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0;
         border-bottom: 1px solid #e4e4e4; }
thead th { border-bottom: 2px solid #1a1a1a; }
.summary td { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 14px 0 0; } figure img { width: 100%; height: auto; display: block; }
.small { font-size: 13.5px; color: #555; }
.samples { table-layout: fixed; width: 100%; font-size: 13.5px; line-height: 1.4; }
.narrow { width: 92px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample + .sample { margin-top: 10px; }
.badge { display: inline-block; font-size: 12px; background: #eee; border-radius: 3px;
         padding: 0 6px; }
a { color: #0b57a4; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""

INTRODUCTION = f"""
<p class="lead">What each reinforcement-learning update did to a language model, split into what
moved through its last layer and what moved through the rest.</p>
<p>The question comes from <a href="{PAPER}">Learning Dynamics in RL Post-Training for Language
Models</a>: does RL make a model surer and less varied because its features are alike, and does
training the classifier first (CF-RL) change how an update spreads? Every figure states what was
measured in these runs and what the paper leads one to expect; whether the two agree is for the
reader to see.</p>
<dl>
<dt>classifier, body</dt><dd>the last linear layer W, which turns a feature vector φ into a logit
for every token; everything before it, which makes φ</dd>
<dt>probe sites</dt><dd>fixed places in fixed texts, at a prompt’s last token or inside a
completion, where the next token is predicted; π is the policy there</dd>
<dt>components</dt><dd>to first order an update changes log π through W (representation component)
and through the body (gradient component); with tied embeddings, where W is also the input layer,
there is a cross component; they add up exactly</dd>
<dt>schedules</dt><dd>standard RL trains all parameters; CF-RL first has a stage of RL that trains
only the classifier; “extra steps” gives standard RL as many steps as CF-RL has in both stages;
“classifier only” never trains the body; step −1 is before training</dd>
</dl>
"""


TITLE = "<title>jaxdyn: what the RL updates did</title>"
SOFTWARE = "jaxdyn report"
"""By which a page and a picture of ours are known."""


def write_page(runs: Sequence[Run], directory: AnyPath) -> AnyPath:
    """Write `report.html`, `figures/*.png` and `tables/*.csv`; an earlier report is replaced.

    The page gets its name first: it says whose the files beside it are.

    Raises:
      JaxdynError: if it cannot, or if one of these files is there and is not a report's.
    """
    require_writable(directory)
    path = directory / "report.html"
    if path.exists() and TITLE.encode() not in path.read_bytes()[:4000]:
        raise JaxdynError(f"{path} is not a report of jaxdyn; choose another output")
    is_ours = lambda png: SOFTWARE.encode() in png.read_bytes()[:200]
    earlier = path.exists() or any(map(is_ours, (directory / "figures").glob("*.png")))
    tables = {"summary": summary.by_group(runs), "summary_by_run": summary.by_run(runs)}
    sections, images = [_summary_section(runs)], {}
    for draw in EXHIBITS:
        with matplotlib.rc_context(STYLE):
            exhibit = draw(runs)
            if exhibit is None:
                continue
            shown = exhibit.figure
            if isinstance(shown, Figure):
                image = images[exhibit.name] = _png(shown)
                shown = _embedded(image, exhibit.title)
        sections.append(_section(exhibit, shown))
        tables |= exhibit.tables
    sections.append(_runs_section(runs))
    files: dict[AnyPath, bytes | str] = {path: _page(sections)}
    files |= {directory / "figures" / f"{name}.png": image for name, image in images.items()}
    files |= {directory / "tables" / f"{name}.csv": table.csv() for name, table in tables.items()}
    for file in files:
        if not earlier and file.exists():
            raise JaxdynError(f"{file} already exists, beside no report; choose another output")
    write_files(files)
    return path


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def _embedded(image: bytes, title: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(image).decode()
    return f'<figure><img alt="{escape(title)}" src="{source}"></figure>'


def _page(sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy(CSS)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{TITLE}\n<style>{CSS}</style></head>\n<body>\n"
        f"<h1>What the RL updates did</h1>\n{INTRODUCTION}\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _summary_section(runs: Sequence[Run]) -> str:
    header, lines = summary.display(runs)
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary.in_words(runs))
    return (
        f"<section><h2>In numbers</h2>\n<ul>{words}</ul>\n"
        f"{_table(header, lines, 'summary')}\n"
        '<p class="small">Mean ± standard deviation over the runs of a schedule. An arrow leads '
        "from before to after training: for evaluations and fixed sites the first and the last "
        "value, for what is measured on each step’s samples the means over the first and the last "
        "tenth of the steps. Shares and correlations are means over the probed updates of all "
        "parameters (where only the classifier is trained, of the classifier). "
        f"{_data('summary', 'summary_by_run')}</p></section>"
    )


def _section(exhibit: Exhibit, shown: str) -> str:
    return (
        f'<section id="{exhibit.name}"><h2>{escape(exhibit.title)}</h2>\n'
        f"<p>{escape(exhibit.shows)}</p>\n<p><i>{escape(exhibit.expects)}</i></p>\n{shown}\n"
        f'<p class="small">{_data(*exhibit.tables)}</p></section>'
    )


def _runs_section(runs: Sequence[Run]) -> str:
    lines = [[r.name, r.schedule, str(r.seed), str(r.steps), str(r.probed)] for r in runs]
    header = ["Run", "Schedule", "Seed", "RL steps logged", "Updates probed"]
    return f"<section><h2>Runs</h2>\n{_table(header, lines, 'runs')}</section>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], kind: str) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'


def _data(*names: str) -> str:
    links = ", ".join(f'<a href="tables/{name}.csv">{name}.csv</a>' for name in names)
    return f"Data: {links}"
