"""Scalars for TensorBoard, written by whoever logs them.

tensorboardX's own writer has a thread, which a full disk ends; whoever logs then waits for it for
ever.
"""

import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from jaxdyn.storage.files import naming

SECONDS = 30.0
"""How long scalars may be held back; a run is done from its own logs, never from these."""


class Board:
    """A new event file in `directory`: what earlier ones hold from step `first` on is void.

    Everything raises JaxdynError where the file cannot be written.
    """

    def __init__(self, directory: Path, first: int):
        self.directory, self._flushed, self._held = directory, time.monotonic(), 0
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # Two that begin in the same second have files of their own.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._writer = EventsWriter(str(directory / "events"), suffix)
            self._write(first, file_version="brain.Event:2")
            self._write(first, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, scalars: dict[str, int | float]) -> None:
        """Numbers by name, at a step."""
        values = [value for name, x in scalars.items() for value in scalar(name, x).value]
        self._write(step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put onto the disk what is held back."""
        self._flushed = time.monotonic()
        with naming(self.directory, self._held):
            self._writer.flush()
        self._held = 0

    def _write(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._held += event.ByteSize()
        with naming(self.directory, self._held):
            self._writer.write_event(event)

    def close(self) -> None:
        with naming(self.directory, self._held):
            self._writer.close()
