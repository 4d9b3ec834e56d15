"""A run's directory: its configuration, and what it writes as it goes.

Lines are appended and flushed a step at a time. A run that was killed and starts again first drops
every line from its checkpoint's step on, so that the finished files are those of a run never
interrupted.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn.errors import Closing, JaxdynError
from jaxdyn.grammar import load_config, save_config
from jaxdyn.paths import PROBE, AnyPath, in_bucket, one_line, open_path, write_whole
from jaxdyn.train.trackers import Tracker, open_trackers


class RunDirectory(Closing):
    """The directory of one run, opened with the run's configuration.

    Files are written on disk. A bucket can neither append nor rename, so a run in one is written
    in a scratch directory, of which `publish` uploads whole files; what a killed run had not
    published, it computes again. Of many processes one writes, into the run; what the others
    write is thrown away.

    Raises:
      JaxdynError: if the directory holds a run of another configuration, or other files.
    """

    def __init__(self, path: str | AnyPath, config: Any, writes: bool = True):
        self.path = open_path(path)
        self.checkpoints = self.path / "checkpoints"
        self._config, self._writes = config, writes
        self._trackers: list[Tracker] = []
        saved = self.path / "config.json"
        begun = saved.exists()
        if begun:
            self._require_same(config, saved)
        elif writes:
            self._require_empty()

        self._bucket = self.path if writes and in_bucket(self.path) else None
        self._published: dict[Path, tuple[int, int]] = {}
        self._scratch = None
        if writes and self._bucket is None:
            self.local = Path(self.path)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="jaxdyn-")
            self.local = Path(self._scratch.name)
        self.local.mkdir(parents=True, exist_ok=True)
        if not begun:
            partial = self.local / "config.partial"
            save_config(config, partial)
            partial.replace(self.local / "config.json")
            self.publish()
        self.dynamics = self.local / "dynamics"
        self.dynamics.mkdir(exist_ok=True)

    def _require_same(self, config: Any, saved: AnyPath) -> None:
        # A run may go on elsewhere: where its arrays lie is no part of what it is, nor what is
        # looked at, or who is told.
        earlier = load_config(type(config), saved)
        train = dataclasses.replace(earlier.train, trackers=config.train.trackers)
        elsewhere = {"mesh": config.mesh, "profile": config.profile, "train": train}
        earlier = dataclasses.replace(earlier, **elsewhere)
        if earlier != config:
            raise JaxdynError(
                f"{self.path} already holds another run ({differences(earlier, config)}); "
                "choose another output"
            )

    def _require_empty(self) -> None:
        ours = {"config.partial", PROBE}
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} - ours:
            raise JaxdynError(f"{self.path} is not empty and holds no run; choose another output")

    def rewind(self, step: int) -> None:
        """Forget everything logged at `step` or later."""
        written = self._bucket or self.local
        for log in sorted(written.glob("*.jsonl")):
            # A text may hold other line separators, and a killed run half a character.
            lines = log.read_bytes().decode("utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _before(line, step)]
            write_whole(self.local / log.name, "".join(line + "\n" for line in kept))
        for array in (written / "dynamics").glob("step_*.npz"):
            if int(array.stem.removeprefix("step_")) >= step:
                array.unlink()
        if self._writes:
            where = written, self.local
            self._trackers = open_trackers(self._config, *where, self.path.name, step)

    def log(self, name: str, *records: dict[str, Any]) -> None:
        """Append records to a log, all on disk at return; scalars also go to the trackers."""
        with open(self.local / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        if name in ("metrics.jsonl", "dynamics.jsonl"):
            for record in records:
                scalars = {k: v for k, v in record.items() if isinstance(v, int | float)}
                step = int(scalars.pop("step"))
                for tracker in self._trackers:
                    tracker.log(step, scalars)

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a log so far."""
        path = self.local / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def save_arrays(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """The per-site arrays of a probed step."""
        path = self.dynamics / f"step_{step:06d}.npz"
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)

    def publish(self) -> None:
        """Upload what has changed to the run's bucket, if it is in one.

        To be called before a checkpoint is saved: so that, whatever checkpoint a run goes on from,
        the bucket has all that was logged before it.

        Raises:
          JaxdynError: if the bucket refuses.
        """
        if self._bucket is None:
            return
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._published.get(path) == version:
                continue
            target = self._bucket / path.relative_to(self.local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            except Exception as error:  # its client raises many kinds
                raise JaxdynError(f"cannot write {target}: {one_line(error)}") from error
            self._published[path] = version

    def close(self) -> None:
        """Publish the last lines; a scratch directory is removed."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        try:
            self.publish()
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()


def _before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except (json.JSONDecodeError, KeyError):
        return False  # the half-written last line of a killed run


def differences(a: Any, b: Any, prefix: str = "") -> str:
    """The first few fields in which two configurations differ, for an error message."""
    found = []
    for field in dataclasses.fields(a):
        old, new = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(old):
            inner = differences(old, new, f"{prefix}{field.name}.")
            found += [inner] if inner else []
        elif old != new:
            found.append(f"{prefix}{field.name}: {old!r} there, {new!r} here")
    return "; ".join(found[:3])
