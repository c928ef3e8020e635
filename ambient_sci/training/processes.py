"""What the processes of one run do together: average, gather, wait. One that has gone ends the others with a
sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from ambient_sci.process_group import leave_at_exit
from ambient_sci.training.errors import ProcessLost

leave_at_exit()


class Processes:
    """The processes that share a run; a single one needs nobody.

    Args:
        accelerator: knows them.

    Every method raises `ProcessLost` where another process has ended or does not answer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes, entry by entry."""
        with self._together():
            return self._accelerator.reduce(values, "mean")  # type: ignore[return-value]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if self.count == 1:
            return rows
        with self._together():
            return self._accelerator.gather(rows.to(self.device).contiguous())  # type: ignore[return-value]

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of what `gather` put together."""
        return rows.chunk(self.count)[self.rank] if self.count > 1 else rows

    def wait(self) -> None:
        """Until every process is here."""
        with self._together():
            self._accelerator.wait_for_everyone()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL have no error of their own for a peer that is gone
            if self.count == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0]
            raise ProcessLost(self.rank, self.count, reason) from None
