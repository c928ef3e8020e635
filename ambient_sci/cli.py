"""The command line: ``ambient-sci COMMAND …``. Argument parsing and calls, nothing else.

Exit status: 0; 2 with one line on standard error for input that is not what was expected; 130 and 143 where
SIGINT or SIGTERM ended it. Results go to standard output, progress and errors to standard error. Launched as
several processes (torchrun), those commands that share their work do so; of the others the main process does
it all.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from ambient_sci import __version__
from ambient_sci.errors import InputError
from ambient_sci.process_group import leave_process_group
from ambient_sci.progress import LOGGER, LineHandler, write_line

PROG = "ambient-sci"
DESCRIPTION = (
    "Diffusion priors learned from noisy or incomplete measurements, and posterior samples with calibrated "
    "uncertainty. With every command: -q says nothing but results and errors, -v more."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"{PROG} {__version__}")
        return 0
    from ambient_sci.commands.common import check_common, main_process
    from ambient_sci.training.errors import TrainingInterrupted

    command = None
    try:
        with _termination_unwinds(), _speaking(arguments) as verbose, _warnings_in_one_line(verbose):
            command = parse([word for word in arguments if word not in (*QUIET, *VERBOSE)])
            check_common(command)
            if getattr(command, "shared", False) or main_process():
                command.run()
    except InputError as error:
        return _fail(f"error: {error}", 2)
    except TrainingInterrupted as error:
        return _fail(f"{error}: {_again(arguments, command)}", error.exit_status)
    except KeyboardInterrupt as error:
        word, number = (
            ("terminated", signal.SIGTERM)
            if isinstance(error, _Terminated)
            else ("interrupted", signal.SIGINT)
        )
        started = hasattr(command, "started") and command.started()
        left = f"continue with: {_again(arguments, command)}" if started else "no unfinished output was left"
        return _fail(f"{word}; {left}", 128 + number)
    except (MemoryError, OSError) as error:  # a full disk, no permission, more than fits
        return _fail(f"error: {str(error) or 'too large for the memory of this machine'}", 2)
    finally:
        leave_process_group()
    return 0


#: Options of every command: only errors and results; or also what is of use in a report of a bug.
QUIET, VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")


@contextlib.contextmanager
def _speaking(arguments: Sequence[str]) -> Iterator[bool]:
    """Status and notes of the package as lines on standard error, as many as were asked for; whether that is
    all there are."""
    quiet, verbose = (any(word in options for word in arguments) for options in (QUIET, VERBOSE))
    if quiet and verbose:
        raise InputError(f"expected {QUIET[1]} or {VERBOSE[1]}, got both")
    level, handler, begun = LOGGER.level, LineHandler(), time.monotonic()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    propagates, LOGGER.propagate = LOGGER.propagate, False
    try:
        LOGGER.debug("%s %s, Python %s", PROG, __version__, sys.version.split()[0])
        yield verbose
        torch = sys.modules.get("torch")
        LOGGER.debug(
            "torch %s, %.1f s in all", getattr(torch, "__version__", "not used"), time.monotonic() - begun
        )
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


def _again(arguments: Sequence[str], command: Any) -> str:
    """The command that goes on where this one was interrupted: with --resume, unless it does so by itself."""
    if not hasattr(command, "resume"):
        return shlex.join([PROG, *arguments])
    return shlex.join([PROG, *(a for a in arguments if a not in ("--resume", "--overwrite")), "--resume"])


def _fail(message: str, status: int) -> int:
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)
    return status


def parse(arguments: Sequence[str]) -> Any:
    """The command with its options, an instance of one of ``COMMANDS``.

    Raises:
        InputError: no such command or option, or a value that is not of its kind.
        SystemExit: status 0, after ``--help``.
    """
    from ambient_sci.commands import COMMANDS

    name = arguments[0] if arguments else None
    for words in (1, 2):
        command = " ".join(arguments[:words])
        if command in COMMANDS:
            return _parse(COMMANDS[command], f"{PROG} {command}", None, arguments[words:])
    group = {key: kind for key, kind in COMMANDS.items() if key.partition(" ")[0] == name}
    if group and arguments[1:2] in (["--help"], ["-h"]):
        return _parse(_any_of(group), PROG, None, arguments[1:])
    if name is not None and not name.startswith("-"):
        given = " ".join(arguments[:2]) if group else name
        raise InputError(f"expected a command, one of {', '.join(group or COMMANDS)}; got {given!r}")
    return _parse(_any_of(COMMANDS), PROG, f"{DESCRIPTION} Version {__version__}.", arguments)


def _any_of(commands: dict[str, type]) -> Any:
    """All commands, each with the first line of its docstring, for the overview."""
    from tyro.conf import subcommand

    lines = {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in commands.items()}
    choices = tuple(
        Annotated[kind, subcommand(name, description=lines[name])] for name, kind in commands.items()
    )
    return Union[choices]  # noqa: UP007  (a tuple of types cannot be written with |)


def _parse(kind: Any, prog: str, description: str | None, arguments: Sequence[str]) -> Any:
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=prog, description=description, args=list(arguments))
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise InputError(_first_paragraph(said.getvalue())) from None


def _first_paragraph(box: str) -> str:
    """What is wrong, in one line, out of the box that tyro draws around it, its hints and the options'
    help."""
    lines = [line.strip("╭╮╰╯│").rstrip(" ─") for line in box.splitlines()]
    title, *rest = [line for line in lines[:1] if line] + lines[1:] or ["unusable arguments"]
    end = next((k for k, line in enumerate(rest) if not line), len(rest))
    title = title.strip(" ─")
    body = " ".join(line.strip() for line in rest[:end] if not line.startswith(" " * 8))
    body = body.replace("'None', ", "").replace(", 'None'", "")  # what an option is where it is not given
    return body if body.startswith(title) else f"{title}: {body}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as something that unwinds the stack, so that temporary files are removed."""


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(signum: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _warnings_in_one_line(verbose: bool) -> Iterator[None]:
    """Our own warnings as one line each; those of libraries below only where --verbose, -W or PYTHONWARNINGS
    asks for them."""
    ours = str(Path(__file__).parent)

    def show(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        if filename.startswith(ours) or verbose or sys.warnoptions:
            write_line(f"{PROG}: warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
