"""What a person sees while a run goes: which stages run and why, loss, speed, time left."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ambient_sci import progress
from ambient_sci.progress import duration
from ambient_sci.training.config import TrainConfig


class Reporter:
    """Sentences and a progress bar on standard error; plain lines now and then where that is not a
    terminal.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True, quiet=not enabled or not progress.is_wanted(), highlight=False)
        #: Steps and seconds of training after which each stage has ended, by its name.
        self.ended: dict[str, tuple[int, float]] = {}

    def say(self, text: str) -> None:
        """One sentence."""
        if self.enabled:
            progress.say(text)

    def stage(self, name: str, config: TrainConfig, step: int, seconds: float) -> StageProgress:
        """A context that shows the progress of one stage, which starts at ``step`` after ``seconds`` of
        training.
        """
        return StageProgress(self, name, config, step, seconds)


class StageProgress:
    """Loss (smoothed), steps per second and time left of one stage."""

    def __init__(self, reporter: Reporter, name: str, config: TrainConfig, step: int, seconds: float) -> None:
        self.reporter, self.name, self.config = reporter, name, config
        self.first, self.begun = step, seconds
        self.loss: float | None = None
        self.last_line = time.monotonic()
        self.above = ExitStack()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=reporter.console,
            # In a notebook rich would need ipywidgets; lines need nothing.
            disable=not reporter.console.is_terminal or reporter.console.is_jupyter,
            transient=True,
        )
        self.task = self.bar.add_task(name, total=1.0, completed=config.progress(step, seconds), status="")

    def __enter__(self) -> StageProgress:
        self.bar.__enter__()
        if not self.bar.disable:
            self.above.enter_context(progress.beneath_lines(self.reporter.console))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.above.close()
        self.bar.__exit__(kind, error, trace)

    def observe(self, loss: float) -> None:
        """A new mean loss over a log interval."""
        self.loss = loss if self.loss is None else 0.8 * self.loss + 0.2 * loss

    def update(self, step: int, seconds: float) -> None:
        """After every step; nothing is read from the accelerator here."""
        if self.bar.disable and time.monotonic() - self.last_line < progress.SECONDS_BETWEEN_LINES:
            return
        status = self._status(step, seconds)
        self.bar.update(self.task, completed=self.config.progress(step, seconds), status=status)
        if self.bar.disable:
            self.last_line = time.monotonic()
            self.reporter.say(f"{self.name}: {status}")

    def _status(self, step: int, seconds: float) -> str:
        spent = seconds - self.begun
        speed = (step - self.first) / spent if spent > 0 else 0.0
        done, start = self.config.progress(step, seconds), self.config.progress(self.first, self.begun)
        left = spent * (1 - done) / (done - start) if done > start else float("nan")
        loss = "" if self.loss is None else f"loss {self.loss:.4g}, "
        return f"step {step}, {loss}{speed:.2f} steps/s, {duration(left)} left"
