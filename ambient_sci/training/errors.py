"""How a training run can end early. Free of torch, so that the command line can catch these without loading
it."""

from __future__ import annotations

import signal

from ambient_sci.errors import InputError


class TrainingDiverged(InputError):
    """The loss or its gradient is not finite. The weights of the last checkpoint are untouched."""

    def __init__(self, message: str, step: int, indices: list[int]) -> None:
        super().__init__(message)
        self.step = step
        self.indices = indices


class TrainingInterrupted(Exception):
    """SIGINT or SIGTERM came; the step was finished and a checkpoint written (where a run folder was given).

    ``exit_status`` is what a shell expects: 128 + signal number, 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, signum: int, step: int, out: str | None) -> None:
        kept = (
            f"checkpoint in {out}, continue with resume"
            if out
            else "no run folder was given, nothing is kept"
        )
        super().__init__(f"training interrupted by {signal.Signals(signum).name} after step {step}; {kept}")
        self.signum = signum
        self.step = step

    @property
    def exit_status(self) -> int:
        """128 + signal number."""
        return 128 + self.signum


class ProcessLost(InputError):
    """Another process of a run on several has ended or does not answer. The last checkpoint is untouched."""

    def __init__(self, rank: int, count: int, reason: str) -> None:
        super().__init__(
            f"process {rank} of {count}: another process of this run has ended or does not answer "
            f"({reason}); "
            "the run continues from its last checkpoint with resume"
        )
