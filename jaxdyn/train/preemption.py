"""SIGTERM, by which clouds and schedulers announce that a machine is taken away.

The step in progress is finished and saved, and the run ends by `errors.Preempted`; the same command
goes on. A second SIGTERM, or SIGINT, ends at once.
"""

import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Preemption:
    """While open, takes note of SIGTERM: `with Preemption() as preemption`."""

    def __init__(self):
        self._told = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            self._before = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, *_) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _take_note(self, *_) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self) -> bool:
        """Whether this process, or another one of the run, has been told to end.

        Every process must ask at every step, and all get the same answer, for they save together.
        It costs a reduction of one number; JAX's own protocol
        (`multihost_utils.reached_preemption_sync_point`) costs another step, of the half a minute
        that a cloud gives.
        """
        if jax.process_count() == 1:
            return self._told
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._told))))
