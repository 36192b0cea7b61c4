"""One tree of errors; each carries the exit code that the command line ends with.

TfslurmError (1)
├── UsageError (2)
├── NotFoundError (3)
├── StatusError (4)
├── InvalidError (5)
│   ├── ConfigurationError
│   └── ValidationError
├── NotPermittedError (6)
├── UnreachableError (7)
├── WaitTimeout (8)
└── EndedBadly (9)
"""

from __future__ import annotations


class TfslurmError(Exception):
    """Something went wrong; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(TfslurmError):
    """The command's words are wrong."""

    exit_code = 2


class NotFoundError(TfslurmError):
    """No such object."""

    exit_code = 3


class StatusError(TfslurmError):
    """The object's status does not allow it: not ready, has active consumers, name taken."""

    exit_code = 4


class InvalidError(TfslurmError):
    """Bad data or configuration."""

    exit_code = 5


class ConfigurationError(InvalidError):
    """A configuration file is wrong; the message names file, line and key."""


class ValidationError(InvalidError):
    """A dataset's rows or files are wrong; `report` holds the counts and the first errors."""

    def __init__(self, message: str, *, hint: str | None = None, report: dict | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


class NotPermittedError(TfslurmError):
    """The caller may not do this."""

    exit_code = 6


class UnreachableError(TfslurmError):
    """Slurm, the database, storage or an endpoint cannot be reached."""

    exit_code = 7


class WaitTimeout(TfslurmError):
    """What was waited for did not happen in time."""

    exit_code = 8


class EndedBadly(TfslurmError):
    """What was waited for ended in error or was stopped."""

    exit_code = 9
