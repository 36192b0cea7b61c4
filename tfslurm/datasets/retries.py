"""What to do when a source fails: ask again, start over, or give up and say why."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable

from tfslurm.errors import InvalidError, NotPermittedError, TfslurmError, UnreachableError

TRIES = 6
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
NO_SUCH_HOST = (socket.EAI_NONAME, socket.EAI_NODATA)
"""What the resolver says for good; EAI_AGAIN may pass."""

_ADVICE = "Credentials come from the environment or the usual files of the user who imports, on the node that does it."
_PUBLIC = ' For a public bucket, write {"s3": {"anon": true}} into ~/.config/fsspec/s3.json.'


class Transient(Exception):
    """The source failed in a way that may pass; `after` is how many seconds it asked to be left alone."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Changed(Exception):
    """The object is another one than that which was listed."""


class Missing(InvalidError):
    """There is no such object."""


class NoRanges(Exception):
    """The server sends the whole object though a part was asked for."""


class Patience:
    """How long one thing is tried: exponential back-off with full jitter, up to TRIES times without progress.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    `wait` sleeps that long; it is an Event's, so that a copy that ends elsewhere wakes it.
    """

    def __init__(self, shown: str, wait: Callable[[float], object] | None = None, tries: int = TRIES) -> None:
        self.shown, self.tries, self.failed = shown, tries, 0
        self.wait = wait or threading.Event().wait

    def progressed(self) -> None:
        """Something came: count anew."""
        self.failed = 0

    def lost(self, error: Transient) -> None:
        """Sleep until the next try. Raises UnreachableError when there have been enough."""
        self.failed += 1
        if self.failed >= self.tries:
            raise UnreachableError(f"{self.shown}: gave up after {self.tries} tries: {error}") from error
        longest = min(LONGEST_DELAY, FIRST_DELAY * 2**self.failed)
        self.wait(max(random.uniform(0, longest), min(error.after, LONGEST_DELAY)))


def of_status(shown: str, status: int, words: str = "", after: float = 0.0) -> TfslurmError | Transient | Changed:
    """What an HTTP status (RFC 9110) means for an import."""
    said = f"{status} {words}".strip()
    if status in (408, 425, 429) or status >= 500:
        return Transient(f"the server answers {said}", after)
    if status in (401, 403, 407):
        return NotPermittedError(f"{shown}: the server does not permit it ({said}).", hint=_ADVICE)
    if status in (404, 410):
        return Missing(f"{shown}: there is no such object, or it may not be seen ({said}).")
    if status in (412, 416):
        return Changed(said)
    return InvalidError(f"{shown}: the server refuses it ({said}).")


def missing_credentials(shown: str, said: str) -> NotPermittedError:
    public = _PUBLIC if shown.lower().startswith("s3:") else ""
    return NotPermittedError(f"{shown}: no usable credentials: {said}", hint=_ADVICE + public)
