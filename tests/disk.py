"""A disk that fills up, played in this process.

    with Disk(root, "metrics", 2):  # full from the third write on to files with such a name
        work()

Files under `root` then take no more bytes than there were: what is deleted makes room again. What a
library writes by itself (the arrays of a checkpoint) is not stopped, but takes its room: it is the
write that follows which finds none.
"""

import builtins
import collections
import errno
import io
import os
import re
import shutil
import threading
from pathlib import Path

Usage = collections.namedtuple("Usage", "total used free")


class Disk:
    """Writes of files under `root`, by name in `written`; full from the one that is named on.

    `name` is a regular expression for the beginning of a path below `root`.
    """

    def __init__(self, root: Path, name: str | None = None, number: int = 0):
        self.root, self.name, self.number = Path(root).absolute(), name, number
        self.room: int | None = None
        self.written: list[str] = []
        self._lock = threading.RLock()

    @property
    def used(self) -> int:
        """Bytes of the files there."""
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # deleted meanwhile
                    continue
        return total

    @property
    def free(self) -> int:
        return 10**9 if self.room is None else max(self.room - self.used, 0)

    def before(self, path: Path, count: int) -> None:
        """Raise if so many bytes find no room."""
        with self._lock:
            name = path.relative_to(self.root).as_posix()
            there = sum(self.matches(known) for known in self.written)
            if self.room is None and self.matches(name) and there == self.number:
                self.room = self.used
            self.written.append(name)
            if count > self.free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def matches(self, name: str) -> bool:
        return self.name is not None and re.match(self.name, name) is not None

    def __enter__(self) -> "Disk":
        self._originals = builtins.open, io.open, shutil.disk_usage
        builtins.open = io.open = self._open
        shutil.disk_usage = self._usage
        return self

    def __exit__(self, *_) -> None:
        builtins.open, io.open, shutil.disk_usage = self._originals

    def _usage(self, path):
        used = self.used
        return Usage(used + self.free, used, self.free)

    def _open(self, file, mode="r", *args, **kwargs):
        opened = self._originals[0](file, mode, *args, **kwargs)
        if not set(mode) & set("wax+") or not isinstance(file, str | os.PathLike):
            return opened
        path = Path(os.path.abspath(os.fspath(file)))
        if not path.is_relative_to(self.root):
            return opened
        write = opened.write

        def checked(data):
            self.before(path, len(data))
            return write(data)

        opened.write = checked
        return opened
