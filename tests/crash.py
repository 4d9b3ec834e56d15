"""A process's end at any of its file operations, played in this process, where nothing need be
compiled again.

    for end in range(len(operations(root, work, output))):
        killed_at(root, end, work, output)  # before its 1st file operation, its 2nd, …
        work(output)                        # given again; then look at what is there

After the end no operation takes place: no `finally` changes a file that a killed process would have
left. Other threads are left alone, which a save goes on in: as if the end came a little later.
"""

import builtins
import contextlib
import gc
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

OPERATIONS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "ftruncate")


class Killed(BaseException):
    """Stands for the process's end: nothing in the package may take it for a failure."""


class Machine:
    """Counts the operations on files under `root`; dies before the one numbered `end`."""

    def __init__(self, root: Path, end: int | None = None):
        self.root, self.end, self.dead = str(root), end, False
        self.done: list[str] = []

    def before(self, name: str, path: object, folder: int | None = None) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif not isinstance(path, str | os.PathLike):
            return
        above = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        path = os.path.abspath(os.path.join(above, os.fspath(path)))
        if not path.startswith(self.root):
            return
        if self.dead or len(self.done) == self.end:
            self.dead = True
            raise Killed(f"{name} {path}")
        self.done.append(f"{name} {os.path.relpath(path, self.root)}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Its operations are watched."""
        originals = {name: getattr(os, name) for name in OPERATIONS}
        opened = builtins.open

        def watched(name):
            def operation(path, *args, **kwargs):
                self.before(name, path, kwargs.get("dir_fd"))
                return originals[name](path, *args, **kwargs)

            return operation

        def open_(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+"):
                self.before("open", file)
            return opened(file, mode, *args, **kwargs)

        try:
            for name in OPERATIONS:
                setattr(os, name, watched(name))
            builtins.open = io.open = open_
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
            builtins.open = io.open = opened


def operations(root: Path, work: Callable[..., object], *given: object) -> list[str]:
    """What the work does to files under `root`, in its order."""
    machine = Machine(root)
    with machine.running():
        work(*given)
    return machine.done


def killed_at(root: Path, end: int, work: Callable[..., object], *given: object) -> bool:
    """Do the work with what is given, up to its file operation `end`; whether it got so far."""
    machine = Machine(root, end)
    with machine.running(), contextlib.suppress(Killed):
        work(*given)
    return machine.dead


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as in the foreground; a suite in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_unheard() -> None:
    """Ctrl-C where Python cannot raise it: in a callback at a garbage collection."""

    def callback(phase, _):
        if phase == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not interrupted")

    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
    time.sleep(60)  # it is to come again


def content(directory):
    """Every file there by name, unfinished ones too."""
    paths = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


def kill_everywhere(tmp_path, work):
    """Kill `work(output)` before each of its operations and give it again: the same files.

    Yields the output in between."""
    work(tmp_path / "whole" / "out")
    expected = content(tmp_path / "whole")
    named = operations(tmp_path / "counted", work, tmp_path / "counted" / "out")
    assert len(named) > 5
    for end in range(len(named)):
        root = tmp_path / str(end)
        assert killed_at(root, end, work, root / "out"), named[end]
        yield root / "out"
        if content(root) == expected:  # all was done: it may say that something is there
            continue
        work(root / "out")
        assert content(root) == expected, named[end]
