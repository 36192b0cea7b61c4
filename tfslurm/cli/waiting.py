"""Waiting for an object to come to an end, with progress on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from tfslurm.errors import EndedBadly, WaitTimeout
from tfslurm.settings import Settings

View = dict[str, Any]

NARROWEST, WIDEST = 8, 36
"""Characters of a bar: in less room there is none."""

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
            stale = refresh(settings).stale
            view = look()
            show(line(view) + (" (Slurm does not answer)" if stale else ""))
            if view["status"] in good:
                return view
            if view["status"] in bad:
                raise _ended_badly(view)
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"{view['kind']} '{view['name']}' is still {view['status']} after {timeout:g} s")
            left = INTERVAL if deadline is None else deadline - time.monotonic()
            time.sleep(min(INTERVAL, max(left, 0)))


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
        yield lambda text: click.echo(f"\r\x1b[K{_cut(text)}", err=True, nl=False)
    finally:
        click.echo(err=True)


def _cut(text: str) -> str:
    """What a terminal's line holds: of more, only the last part would be written over."""
    room = shutil.get_terminal_size().columns - 1
    return text if len(text) <= room else text[: room - 1] + "…"


def progress_line(name: str, done: int, total: int, said: str) -> str:
    """A bar between what is waited for and how it goes, as long as there is room for it."""
    room = shutil.get_terminal_size().columns - len(name) - len(said) - 6
    width = min(room, WIDEST)
    if width < NARROWEST:
        return f"{name}: {said}"
    filled = width * min(done, total) // max(total, 1)
    return f"{name} [{'#' * filled}{'-' * (width - filled)}]  {said}"


def duration(seconds: float) -> str:
    """Time as people say it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


timeout_option = click.option("--timeout", type=float, metavar="SECONDS", help="Give up waiting after so long.")
