"""Whether what a run has recorded is whole, up to its newest checkpoint.

A run writes its logs before the checkpoint that follows: all that came before a checkpoint is
there, line by line, unless somebody or something has taken it away. After it there may be more
lines, of steps that a killed run takes again, and of the very last perhaps a half.
"""

import collections
import itertools
import zipfile
from collections.abc import Iterable, Iterator

from jaxdyn.config import Config
from jaxdyn.errors import JaxdynError
from jaxdyn.storage.paths import AnyPath, in_bucket
from jaxdyn.storage.reading import Record, read_arrays, read_records
from jaxdyn.train.seal import SAVED


def require_whole(run: AnyPath, config: Config, newest: int | None) -> None:
    """Refuse to go on with a run that has lost what it recorded; its arrays too are read, on disk.

    Raises:
      JaxdynError: naming the first file that is not whole, and what to do.
    """
    for found in damages(run, config, newest, arrays=not in_bucket(run)):
        raise JaxdynError(
            f"{run} is not whole: {found}; put back a copy of it, or choose another output to "
            "begin anew"
        )


def damages(
    run: AnyPath, config: Config, newest: int | None, arrays: bool = False
) -> Iterator[str]:
    """What is not whole, one thing after another, in words.

    Args:
      newest: the step of the newest checkpoint; None if there is none.
      arrays: whether to read the files of arrays through, beside looking that they are there.
    """
    try:
        logs = {path.name: read_records(path) for path in sorted(run.glob("*.jsonl"))}
    except JaxdynError as error:
        yield str(error)
        return
    metrics = logs.get("metrics.jsonl", [])
    if newest is None:
        if metrics and had_checkpoints(run):
            yield f"{run / 'checkpoints'} has lost its checkpoints"
        return
    wanted_steps = expected(config, newest, metrics)
    for name, wanted in wanted_steps.items():
        steps = [record["step"] for record in logs.get(name, [])]
        if wanted and not (run / name).exists():
            yield f"{run / name} is missing"
        elif missing := sorted(set(wanted) - set(steps)):
            yield f"{run / name} has no line of step {missing[0]}"
        elif (back := goes_back(steps)) is not None:
            yield f"{run / name} goes back to step {back}"
        elif name in ONE_A_STEP and (twice := repeated(steps)) is not None:
            yield f"{run / name} has two lines of step {twice}"
        elif name in AS_MANY_A_STEP and (fewer := with_fewer(steps, wanted)) is not None:
            yield f"{run / name} has fewer lines of step {fewer} than of others"
    for step in wanted_steps["dynamics.jsonl"]:
        path = run / "dynamics" / f"step_{step:06d}.npz"
        if not path.exists():
            yield f"{path} is missing"
        elif arrays and not is_whole_archive(path):
            yield f"{path} is damaged"
    yield from ledger_gaps(run, logs.get("ledger.jsonl", []), config, newest)


ONE_A_STEP = ("metrics.jsonl", "dynamics.jsonl")
"""Logs of a line a step."""

AS_MANY_A_STEP = ("samples.jsonl", "completions.jsonl")
"""Logs of as many lines a step."""


def expected(config: Config, newest: int, metrics: list[Record]) -> dict[str, list[int]]:
    """The steps of which each log has a line, if the run has come to checkpoint `newest`."""
    steps = list(range(-1, newest))
    every = config.probe.every
    probed = [step for step in steps if step < 0 or (step + 1) % every == 0] if every else []
    is_evaluated = lambda record: any(name.startswith("eval_") for name in record)
    evaluated = [record["step"] for record in metrics if is_evaluated(record)]
    kept = getattr(config.train, "save_completions", 0)
    return {
        "metrics.jsonl": steps,
        "dynamics.jsonl": probed,
        # Scores of pairs have no samples.
        "samples.jsonl": [step for step in evaluated if step < newest and config.kind != "reward"],
        "completions.jsonl": steps[1:] if config.kind == "rl" and kept else [],
        "temperatures.jsonl": [-1] if config.evaluation.temperatures else [],
    }


def ledger_gaps(run: AnyPath, segments: list[Record], config: Config, newest: int) -> Iterator[str]:
    """Where the ledger's segments do not lead from the start to the checkpoint."""
    if not (config.probe.every and config.probe.ledger and newest):
        return
    reached = 0
    for segment in segments:
        if reached < newest and segment.get("from") != reached:
            break
        reached = max(reached, segment["step"] + 1)
    if reached < newest:
        yield f"{run / 'ledger.jsonl'} has no segment that begins with step {reached}"


def goes_back(steps: Iterable[int]) -> int | None:
    """The first number that is below the one before."""
    return next((b for a, b in itertools.pairwise(steps) if b < a), None)


def repeated(steps: Iterable[int]) -> int | None:
    """The first number that comes again."""
    seen: set[int] = set()
    for step in steps:
        if step in seen:
            return step
        seen.add(step)
    return None


def with_fewer(steps: Iterable[int], wanted: Iterable[int]) -> int | None:
    """The first wanted step of which there are fewer lines than of another."""
    counts = collections.Counter(steps)
    most = max((counts[step] for step in wanted), default=0)
    return next((step for step in wanted if counts[step] < most), None)


def is_whole_archive(path: AnyPath) -> bool:
    """Whether a file of arrays can be read to its end, as it was written."""
    try:
        read_arrays(path)  # not if it would unpack to more than there could be
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged one raises many kinds
        return False


def had_checkpoints(run: AnyPath) -> bool:
    """Whether a run with lines once had a checkpoint; in a bucket not known."""
    checkpoints = run / "checkpoints"
    return not in_bucket(run) and (not checkpoints.exists() or (checkpoints / SAVED).exists())
