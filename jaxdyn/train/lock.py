"""One writer a run: a lock in its directory, which the system takes back when the process ends."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.files import naming
from jaxdyn.storage.reading import parse_json

NAME = "run.lock"
"""The file that is locked; it stays, and says who was the last to hold it."""

_held: set[int] = set()


class Lock:
    """Held from here to `release`, or to the end of the process, however it ends.

    Of processes on one machine; on several only where their file system passes locks on, and none
    at all where it knows of none.

    Raises:
      JaxdynError: naming the process that holds it.
    """

    def __init__(self, directory: Path):
        path = directory / NAME
        with naming(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(descriptor)
        self.release = weakref.finalize(self, _release, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _said(descriptor)
            self.release()
            raise JaxdynError(
                f"{directory} is being written by {holder}; wait until it ends, or stop it"
            ) from error
        except OSError:  # a file system without locks
            return
        now = datetime.datetime.now().isoformat(" ", "seconds")
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # a full disk: the lock itself takes no room
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)


def holder(directory: Path) -> str | None:
    """Who writes the run at present, in words; None for nobody."""
    try:
        descriptor = os.open(directory / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return None


def _said(descriptor: int) -> str:
    try:
        about = parse_json(os.pread(descriptor, 1000, 0), NAME)
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, JaxdynError, TypeError, KeyError):
        return "another process"


def _release(descriptor: int) -> None:
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def _forget() -> None:
    for descriptor in list(_held):
        _release(descriptor)


# A process that a reward forks must not hold the lock on, should it live longer than the run.
os.register_at_fork(after_in_child=_forget)
