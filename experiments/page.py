"""docs/findings.md, made of what the claims' scripts have kept: no number in it is typed.

The words are in experiments/results/findings/text.md: a section a script, under its name, and
`intro`, `unseen` and `open`. A figure in them is a field, {anagram 1} or {anagram 1 value}: of a
model's results the verdict's number from 0, with its interval, or alone `value`, `low`, `high`,
`p`, `seeds` or `over`; of another script {anagram 1 value classifier_first}.

Command:   python experiments/page.py
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from inference import holm

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "findings"
PAGE = HERE.parent / "docs" / "findings.md"

CLAIMS = {
    "features": "Features vary little",
    "first_order": "The first order holds",
    "confidence": "RL raises confidence and lowers diversity",
    "representation": "The representation component does it",
    "classifier_first": "CF-RL speeds up RL",
    "gradient_component": "By shaping the gradient component",
    "lp_ft": "Not for LP-FT's reasons",
    "best_of_n": "Best-of-N narrows the gaps",
    "accumulation": "What adds up, and what cancels",
    "gauge": "The share of a component is a matter of gauge",
    "layers": "Which layers carry it",
    "proxies": "Cheap proxies of influence",
    "forking_tokens": "Forking tokens",
    "kl_price": "What a KL buys",
    "horizon": "How far a frozen kernel sees",
    "squeezing": "Negative advantages squeeze",
    "spurious_rewards": "What shuffled rewards leave",
    "algorithms": "Two algorithms against CF-RL and an entropy bonus",
}
"""Every claim's script, in the page's order: the paper's, ours, algorithms. Who adds one adds a
line."""

Found = dict[str, dict[str, dict[str, Any]]]
"""What was kept, by model and script."""

LEVEL = 0.05


def load(results: Path = RESULTS) -> Found:
    """All answers, by model and script, in the order of `CLAIMS`."""
    found: Found = {}
    for directory in sorted(path for path in results.iterdir() if path.is_dir()):
        there = [name for name in CLAIMS if (directory / f"{name}.json").exists()]
        if there:
            read = lambda name, of=directory: json.loads((of / f"{name}.json").read_text())
            found[directory.name] = {name: read(name) for name in there}
    return found


def raised(found: Found) -> Found:
    """The same with `holm`, each p raised for all the verdicts of its model, and rulings that rest
    on a p taken back where it is then too large."""
    for answers in found.values():
        p_values = {
            f"{script} {number}": verdict["p"]
            for script, answer in answers.items()
            for number, verdict in enumerate(answer["verdicts"])
            if verdict["p"] is not None
        }
        for key, p in holm(p_values).items():
            script, number = key.split()
            verdict = answers[script]["verdicts"][int(number)]
            verdict["holm"] = p
            if verdict["p"] < LEVEL <= p and verdict["ruling"] != "undecided":
                verdict["ruling"] = "undecided"
    return found


def shown(x: float | None) -> str:
    """A number as the page has it."""
    return "–" if x is None else f"{x:.3g}".replace("-", "−")


def interval(verdict: dict[str, Any]) -> str:
    """A value with its interval."""
    return f"{shown(verdict['value'])} ({shown(verdict['low'])} to {shown(verdict['high'])})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def overview(found: Found) -> str:
    """Every claim, and what each model says of it."""
    rows = []
    for script in CLAIMS:
        claims = dict.fromkeys(
            verdict["claim"]
            for answers in found.values()
            for verdict in answers.get(script, {}).get("verdicts", ())
        )
        for claim in claims:
            cells = []
            for answers in found.values():
                own = answers.get(script, {}).get("verdicts", ())
                mine = [verdict for verdict in own if verdict["claim"] == claim]
                cells.append(f"{mine[0]['ruling']}: {interval(mine[0])}" if mine else "")
            rows.append([f"[{claim}](#{script.replace('_', '-')})", *cells])
    return table(["claim", *found], rows)


def of_script(script: str, found: Found) -> str:
    """A script's verdicts on all models, in full."""
    rows = [
        [
            model,
            verdict["claim"],
            verdict["ruling"],
            f"{verdict['statistic']}: {interval(verdict)}",
            verdict["over"],
            "; ".join(shown(verdict.get(key)) for key in ("p", "holm")),
            verdict["note"],
        ]
        for model, answers in found.items()
        for verdict in answers.get(script, {}).get("verdicts", ())
    ]
    return table(["model", "claim", "", "measured, 95 %", "over", "p; Holm", ""], rows)


def texts(path: Path) -> dict[str, str]:
    """The words, by section."""
    parts = re.split(r"^# (\w+)\n", path.read_text(), flags=re.MULTILINE) if path.exists() else [""]
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def filled(text: str, script: str, found: Found) -> str:
    """The words with their figures.

    Raises:
      KeyError: for a field that names no verdict.
    """

    def figure(match: re.Match) -> str:
        model, number, what, where = match.groups()
        verdicts = found[model][where or script]["verdicts"]
        if int(number) >= len(verdicts):
            raise KeyError(f"{match[0]}: {model} has {len(verdicts)} verdicts of {where or script}")
        verdict = verdicts[int(number)]
        if what is None:
            return interval(verdict)
        value = verdict[what]
        return shown(value) if isinstance(value, int | float) else str(value)

    return re.sub(r"\{([\w.-]+) (\d+)(?: (\w+))?(?: (\w+))?\}", figure, text)


def page(results: Path = RESULTS, output: Path = PAGE) -> str:
    """The page's Markdown."""
    found, words = raised(load(results)), texts(results / "text.md")
    said = lambda name: filled(words.get(name, ""), name, found)
    parts = ["# Findings", said("intro"), overview(found)]
    for script, title in CLAIMS.items():
        models = [model for model, answers in found.items() if script in answers]
        if not models:
            continue
        where = Path("..") / results.relative_to(output.parent.parent)
        figures = [f"![{title}: {m}]({(where / m / script).as_posix()}.png)" for m in models]
        parts += [f'## <a id="{script.replace("_", "-")}"></a>{title}', said(script)]
        parts += [*figures, of_script(script, found)]
    for name, title in (("unseen", "What the paper could not see"), ("open", "What remains open")):
        if name in words:
            parts += [f"## {title}", said(name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
