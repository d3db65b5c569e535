"""Errors that are the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what, why and what to do.

    Args:
        message: The line.
        reason: What was at fault: `params`, `data` or `teacher`.
    """

    exit_status = 2

    def __init__(self, message: str, reason: str = "params") -> None:
        super().__init__(message)
        self.reason = reason


class DivergedError(ArithmeticError):
    """Training produced a loss or weights that are not finite."""

    exit_status = 1
    reason = "diverged"


class Notice(UserWarning):
    """A warning to the user: the log shows its line and not the place in the code that it came from."""

    plain = True
