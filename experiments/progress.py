"""How far a run is, for eyes: a bar on a terminal, plain lines anywhere else.

A worker's output is a pipe to the process that started it, which alone knows of the terminal: asked to by the
environment, the worker sends marked lines, and its parent turns them into the bar.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xattn.experiments.record import say

MARK = "\x1eprogress "
ASKED = "XATTN_PROGRESS"
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_MARKS = 0.2


def on_terminal() -> bool:
    """Whether somebody watches standard output."""
    return sys.stdout.isatty()


class Bar:
    """A rich progress bar below the lines that are said meanwhile; it appears with the first update."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None

    def update(self, step: int, steps: int, text: str) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
            self._progress = Progress(*columns, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("", total=steps)
        self._progress.update(self._task, completed=step, total=steps, description=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Display:
    """Where a training loop reports each step: a bar, marks for a parent's bar, or a line every ten seconds."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent, self._last = silent, 0.0
        self._marks = os.environ.get(ASKED) == "1"
        self._bar = Bar() if not silent and not self._marks and on_terminal() else None

    def step(self, step: int, steps: int, text: str, *, important: bool) -> None:
        """Report a step; `important` ones are not left out."""
        now = time.perf_counter()
        waited = now - self._last
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(step, steps, text)
        elif self._marks:
            if important or waited >= _SECONDS_BETWEEN_MARKS:
                self._last = now
                say(MARK + json.dumps([step, steps, text]))
        elif important or waited >= _SECONDS_BETWEEN_LINES:
            self._last = now
            say(f"step {step}/{steps}  {text}")

    def close(self) -> None:
        """Take a bar away, so that lines can be said below."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def following(prefix: str) -> Iterator[Any]:
    """A function that takes a worker's lines: marks move the bar and return True, other lines return False."""
    bar = Bar()

    def take(line: str) -> bool:
        if not line.startswith(MARK):
            return False
        step, steps, text = json.loads(line.removeprefix(MARK))
        bar.update(step, steps, prefix + text)
        return True

    try:
        yield take
    finally:
        bar.close()
