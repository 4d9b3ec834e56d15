"""Mathematical answers, judged by math-verify (github.com/huggingface/Math-Verify), an extra.

It parses with SymPy, which on some texts does not end, and its own time limit is a signal: that
needs the main thread, and a process whose signals are nobody else's. So it runs in a process of its
own, which is asked in lines of JSON.
"""

import atexit
import contextlib
import dataclasses
import json
import select
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxdyn.grammar import above
from jaxdyn.rewards.verifiable import Scores, Texts, column_of
from jaxdyn.types import JaxdynError

GRACE = 30.0
"""Seconds that the process may take to start, and beyond its own limits."""


@dataclasses.dataclass(frozen=True)
class MathVerify:
    """1 where the completion's answer equals the example's in mathematics, else 0 (math-verify).

    Fractions, sets, intervals, expressions in LaTeX or plain. None where the example's answer
    cannot be read. What takes longer than the limit is 0.

    Attributes:
      answer: the column with the answer, with or without $ around it.
      timeout: seconds for reading a text, and for comparing two.
    """

    answer: str = "answer"
    timeout: int = 5

    def __post_init__(self):
        above(0, self, "reward.math_verify", "timeout")

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        if find_spec("math_verify") is None:
            raise JaxdynError("needs math-verify: pip install 'jaxdyn[math]'")
        wanted = column_of(columns, self.answer)
        pairs = zip(completions, wanted, strict=True)
        return [None if y is None else JUDGE.ask(str(y), x, self.timeout) for x, y in pairs]


class Judge:
    """The process, started when first asked; one that dies or hangs is started again."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, wanted: str, completion: str, timeout: int) -> float | None:
        """1 or 0, or None where `wanted` cannot be read; 0 where no answer comes in time.

        Raises:
          JaxdynError: if the process does not start.
        """
        with self._lock:
            process = self._running()
            answers: Any = process.stdout
            asked = {"wanted": wanted, "completion": completion, "timeout": timeout}
            with contextlib.suppress(OSError, ValueError):
                print(json.dumps(asked), file=process.stdin, flush=True)
                if select.select([answers], [], [], 3 * timeout + GRACE)[0]:
                    return json.loads(answers.readline())
            self.stop()
            return 0.0

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            worker = Path(__file__).with_name("mathematics_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(worker), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            answers: Any = self._process.stdout
            if not (select.select([answers], [], [], GRACE)[0] and answers.readline()):
                self.stop()
                raise JaxdynError("math-verify does not start: try python -c 'import math_verify'")
        return self._process

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


JUDGE = Judge()
atexit.register(JUDGE.stop)
