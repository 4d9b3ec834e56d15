"""A progress bar with the reward and the time left; plain lines where there is no terminal.

Of many processes the first shows it.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """One bar at a time: `with progress.start(...)`, and `advance` with figures to show."""

    def __init__(self, seconds_between_lines: float = 10.0):
        self.console = Console(file=sys.stderr, quiet=jax.process_index() > 0)
        self._between = seconds_between_lines
        self._bar: Bar | None = None

    def start(self, title: str, total: int, done: int = 0) -> "Progress":
        self._title, self._total, self._done = title, total, done
        self._began, self._first, self._last_line = time.monotonic(), done, 0.0
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done, figures="")
        return self

    def __enter__(self) -> None:
        pass

    def advance(self, **figures: float) -> None:
        self._done += 1
        if self._done == self._first + 1:  # the first step compiles: no measure of the others
            self._began = time.monotonic()
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line >= self._between or self._done == self._total:
            self._last_line = now
            measured = self._done - self._first - 1
            pace = (now - self._began) / max(measured, 1)
            left = f"  {pace * (self._total - self._done):.0f} s left" if measured else ""
            line = f"{self._title}  {self._done}/{self._total}  {text}{left}"
            self.console.print(line, highlight=False)

    @contextlib.contextmanager
    def tiles(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A function of how many are done and of all; its first call may be of many at once."""
        with contextlib.ExitStack() as stack:
            begun: list[int] = []

            def report(done: int, total: int) -> None:
                if not begun:
                    begun.append(done)
                    stack.enter_context(self.start(title, total, done - 1))
                self._total = total
                self.advance()

            yield report

    def __exit__(self, *_) -> None:
        """Put the bar away, also when the work failed: it hides the terminal's cursor."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
