"""Errors that a user can act on. The command line prints them as one line and exits with status 2."""

from __future__ import annotations


class InputError(ValueError):
    """Input from outside (a file, an option, an array) is not what was expected; the message says both."""


class ConditioningError(InputError):
    """A prior of the other kind is needed: unconditional instead of mask-conditional, or the reverse."""


class IdentifiabilityError(InputError):
    """The mask design cannot supervise some rows, so training on it would silently learn nothing there."""
