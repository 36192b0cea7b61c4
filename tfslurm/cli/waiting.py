"""Waiting for an object to come to an end, with progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from tfslurm.errors import EndedBadly, WaitTimeout
from tfslurm.settings import Settings

View = dict[str, Any]

INTERVAL = 1.0
"""Seconds between two looks; Slurm itself is asked no more often than the site's poll floor."""


def wait_for(
    settings: Settings,
    look: Callable[[], View],
    *,
    good: set[str],
    bad: set[str],
    timeout: float | None = None,
    line: Callable[[View], str] = lambda view: view["status"],
) -> View:
    """Look until the status is a good or a bad one; the last view.

    Raises WaitTimeout after `timeout` seconds, EndedBadly for a bad status.
    """
    from tfslurm.sync import refresh  # late: a listing needs only the options below

    deadline = None if timeout is None else time.monotonic() + timeout
    with _status_line() as show:
        while True:
            refresh(settings)
            view = look()
            show(line(view))
            if view["status"] in good:
                return view
            if view["status"] in bad:
                raise _ended_badly(view)
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"{view['kind']} '{view['name']}' is still {view['status']} after {timeout:g} s")
            time.sleep(INTERVAL)


def _ended_badly(view: View) -> EndedBadly:
    return EndedBadly(
        f"{view['kind']} '{view['name']}' is {view['status']}: {view['error'] or 'see its events'}",
        hint="\n".join(view.get("log_tail") or []) or None,
    )


@contextmanager
def _status_line() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that is written over; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield lambda text: click.echo(f"\r\x1b[K{text}", err=True, nl=False)
    finally:
        click.echo(err=True)


timeout_option = click.option("--timeout", type=float, metavar="SECONDS", help="Give up waiting after so long.")
