"""`jaxdyn check`: whether a run's directory is whole, file by file; it changes nothing."""

from collections.abc import Iterator

from jaxdyn.config import KINDS, Config
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import load_config
from jaxdyn.storage.paths import AnyPath, in_bucket, is_directory, open_path
from jaxdyn.train import lock
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.records import damages
from jaxdyn.train.seal import is_sealed


def check(run: str | AnyPath) -> str:
    """Look through a run: its configuration, its logs, its arrays, its checkpoints' checksums.

    Prints what is not whole, a line each; returns what there is, in words.

    Raises:
      JaxdynError: if something is not whole, or the directory holds no run.
    """
    path = open_path(run)
    if not is_directory(path) or not (path / "config.json").exists():
        raise JaxdynError(f"{path} holds no run: it has no config.json")
    config = load_config(KINDS, path / "config.json")
    if not in_bucket(path) and (writer := lock.holder(path)):
        print(f"{path} is being written by {writer}")
    steps, found = [], []
    if (path / "checkpoints").exists():
        with Checkpoints(path / "checkpoints", metric=config.train.keep_best) as checkpoints:
            steps = checkpoints.steps()
            found = list(damaged_checkpoints(checkpoints, steps))
    found += damages(path, config, steps[-1] if steps else None, arrays=True)
    for line in found:
        print(line)
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise JaxdynError(f"{path} is not whole: {found[0]}{more}")
    return summary(path, config, steps)


def damaged_checkpoints(checkpoints: Checkpoints, steps: list[int]) -> Iterator[str]:
    """What of the checkpoints is not as it was saved."""
    for step in steps:
        if damage := checkpoints.damage(step):
            yield damage
            continue
        try:
            checkpoints.position(step)
        except JaxdynError as error:
            yield str(error)


def summary(path: AnyPath, config: Config, steps: list[int]) -> str:
    """What was found whole."""
    if not steps:
        return f"{path}: {config.kind}, no checkpoint yet"
    words = f"{path}: {config.kind}, checkpoints at {', '.join(map(str, steps))}"
    unsealed = [s for s in steps if not is_sealed(path / "checkpoints" / str(s))]
    if unsealed:
        words += f"; of {', '.join(map(str, unsealed))} there are no checksums"
    return words
