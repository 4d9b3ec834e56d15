"""A run's directory: its configuration, and what it writes as it goes.

Lines are appended and flushed a step at a time. A run that was killed and starts again first drops
every line from its checkpoint's step on, so that the finished files are those of a run never
interrupted. Before that it sees that everything up to there is whole (`jaxdyn.train.records`).
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxdyn.config import Config
from jaxdyn.errors import Closing, JaxdynError
from jaxdyn.grammar import load_config, save_config
from jaxdyn.storage.files import PROBE, is_unfinished, naming, write_file
from jaxdyn.storage.paths import AnyPath, in_bucket, open_path
from jaxdyn.storage.reading import parse_json, read_records
from jaxdyn.train import lock
from jaxdyn.train.lock import Lock
from jaxdyn.train.records import require_whole
from jaxdyn.train.trackers import Tracker, open_trackers


class RunDirectory(Closing):
    """The directory of one run, opened with the run's configuration.

    Files are written on disk. A bucket can neither append nor rename, so a run in one is written
    in a scratch directory, of which `publish` uploads whole files; what a killed run had not
    published, it computes again. Of many processes one writes, into the run; what the others
    write is thrown away. A run on disk is locked by its writer. What is left of a run that failed
    before its first line is removed.

    Raises:
      JaxdynError: if the directory holds a run of another configuration, or other files, cannot be
        written, or is being written by another process.
    """

    def __init__(self, path: str | AnyPath, config: Config, writes: bool = True):
        self.path = open_path(path)
        self.checkpoints = self.path / "checkpoints"
        self._config, self._writes = config, writes
        self._trackers: list[Tracker] = []
        self._lock: Lock | None = None
        saved = self.path / "config.json"
        if saved.exists():
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
        self.dynamics = self.local / "dynamics"
        self._made = not self.local.exists()
        with naming(self.local):
            self.local.mkdir(parents=True, exist_ok=True)
        try:
            if self._scratch is None and writes:
                self._lock = Lock(self.local)
            if saved.exists():  # perhaps only now: another process may have made it
                self._require_same(config, saved)
                if writes and not self.checkpoints.exists():
                    require_whole(self.path, config, None)
            else:
                save_config(config, self.local / "config.json")
                self.publish()
            with naming(self.dynamics):
                self.dynamics.mkdir(exist_ok=True)
        except JaxdynError:
            self._remove_unbegun()
            raise

    def _require_same(self, config: Config, saved: AnyPath) -> None:
        # A run may go on elsewhere: where its arrays lie is no part of what it is, nor what is
        # looked at, or who is told.
        earlier = load_config(type(config), saved)
        train = dataclasses.replace(earlier.train, trackers=config.train.trackers)
        elsewhere: dict[str, Any] = {"mesh": config.mesh, "profile": config.profile, "train": train}
        earlier = dataclasses.replace(earlier, **elsewhere)
        if earlier != config:
            raise JaxdynError(
                f"{self.path} already holds another run ({differences(earlier, config)}); "
                "choose another output"
            )

    def _require_empty(self) -> None:
        if not self.path.is_dir():
            return
        names = {path.name for path in self.path.iterdir() if not is_unfinished(path)}
        if names - {PROBE, lock.NAME}:
            raise JaxdynError(f"{self.path} is not empty and holds no run; choose another output")

    def require_whole(self, config: Config, newest: int | None) -> None:
        """JaxdynError, naming the file, if what was logged before a checkpoint is not whole."""
        if self._bucket is not None or self._scratch is None:
            require_whole(self.path, config, newest)

    def rewind(self, step: int) -> None:
        """Forget everything logged at `step` or later."""
        for tracker in self._trackers:
            tracker.close()
        written = self._bucket or self.local
        for log in sorted(written.glob("*.jsonl")):
            # A text may hold other line separators, and a killed run half a character.
            lines = log.read_bytes().decode("utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _before(line, step)]
            write_file(self.local / log.name, "".join(line + "\n" for line in kept))
        for array in (written / "dynamics").glob("step_*.npz"):
            if int(array.stem.removeprefix("step_")) >= step:
                array.unlink()
        if self._writes:
            where = written, self.local
            self._trackers = open_trackers(self._config, *where, self.path.name, step)

    def log(self, name: str, *records: dict[str, Any]) -> None:
        """Append records to a log, all on disk at return; scalars also go to the trackers."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        data = lines.encode(errors="replace")
        with naming(self.local / name, len(data)), open(self.local / name, "ab") as file:
            file.write(data)
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
        return read_records(self.local / name)

    def save_arrays(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """The per-site arrays of a probed step."""
        write_file(self.dynamics / f"step_{step:06d}.npz", packed(arrays))

    def publish(self) -> None:
        """Upload what has changed to the run's bucket, if it is in one.

        To be called before a checkpoint is saved: so that, whatever checkpoint a run goes on from,
        the bucket has all that was logged before it.

        Raises:
          JaxdynError: if the bucket refuses.
        """
        if self._bucket is None:
            return
        for tracker in self._trackers:
            tracker.flush()
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._published.get(path) == version:
                continue
            target = self._bucket / path.relative_to(self.local).as_posix()
            write_file(target, path.read_bytes())
            self._published[path] = version

    def close(self) -> None:
        """Publish the last lines; a scratch directory is removed, and the lock given back."""
        trackers, self._trackers = self._trackers, []
        try:
            for tracker in trackers:
                tracker.close()
            self.publish()
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()
            if self._lock is not None:
                self._lock.release()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        metrics = self.local / "metrics.jsonl"
        begun = not isinstance(error, JaxdynError) or (
            metrics.exists() and metrics.stat().st_size > 0
        )
        super().__exit__(kind, error, trace)
        if not begun:
            self._remove_unbegun()

    def _remove_unbegun(self) -> None:
        """Remove the directory if this process has made it, and nobody else writes there."""
        if self._lock is not None:
            if self._made:
                shutil.rmtree(self.local, ignore_errors=True)
            self._lock.release()
        elif self._made:
            with contextlib.suppress(OSError):  # not empty
                self.local.rmdir()


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays by name as a compressed .npz, without pickles."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _before(line: str, step: int) -> bool:
    try:
        return parse_json(line, "a log")["step"] < step
    except (JaxdynError, KeyError, TypeError):
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
