"""Several processes of one launch, for the tests of what they share and agree on."""

from __future__ import annotations

import os
import subprocess
import sys


def launch(
    *arguments: object, module: bool = False, number: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``arguments`` (a script, or a ``module``, and its own) by torchrun; whatever happens, no process is
    left behind.

    A launch that hangs ends in `subprocess.TimeoutExpired`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        # After the dashes: torchrun takes --num for an abbreviation of an option of its own.
        [*command, *(["-m"] if module else []), "--", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: it has to end its workers first
            process.communicate()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
