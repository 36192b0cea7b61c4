"""Begin a trainer's processes anew, each under its own id, when one of them ran out of memory.

What failed halfway through a collective cannot be taken back in place: so the one that failed writes the new cap, every
other one sees it there, and all of them start over, and go on from the state that was saved last.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tfslurm.paths import JobPaths
from tfslurm.training import caps
from tfslurm.training.outcome import is_witness

INTERVAL = 1.0
"""Seconds between two looks at the cap."""

GRACE = 5.0
"""Seconds until a process that knows starts over, so that none sees another one's connections break before it knows."""

ONCE = threading.Lock()
"""Held for good by the thread that starts this process over."""


@contextmanager
def on_short_memory(paths: JobPaths, cap: caps.Cap | None, capacity: int, world_size: int) -> Iterator[None]:
    """Where memory runs out in here, in any of the processes, all of them start over, and this does not return.

    `cap` is what was lowered so far, `capacity` the tokens of a micro-batch in force. Raises InvalidError where a
    smaller one would not help.
    """
    seen, done = caps.lowered(cap), threading.Event()
    if world_size > 1:
        threading.Thread(target=_watch, args=(paths, seen, done), daemon=True).start()
    try:
        yield
    except caps.OutOfMemory as failed:
        cap = caps.lower(paths.cap, failed, cap, capacity)
        print(f"starting over with at most {cap.tokens:,} tokens a micro-batch", flush=True)
        start_over(paths.folder, GRACE if world_size > 1 else 0)
    except RuntimeError as error:
        if is_witness(error):
            _wait_for_cap(paths, seen)
        raise
    finally:
        done.set()


def _watch(paths: JobPaths, seen: int, done: threading.Event) -> None:
    while not done.wait(INTERVAL):
        if caps.lowered(caps.read(paths.cap)) > seen:
            start_over(paths.folder, GRACE)


def _wait_for_cap(paths: JobPaths, seen: int) -> None:
    """Start over if another process lowered the cap: its end may be known here before its reason is."""
    end = time.monotonic() + 2 * GRACE
    while time.monotonic() < end:
        if caps.lowered(caps.read(paths.cap)) > seen:
            start_over(paths.folder)
        time.sleep(INTERVAL / 4)


def start_over(folder: Path, seconds: float = 0.0) -> NoReturn:
    """Replace this process by a new one of the same rank, `seconds` from now; the device's memory is free then."""
    time.sleep(seconds)
    ONCE.acquire()
    sys.stdout.flush()
    sys.stderr.flush()
    if "MASTER_PORT" in os.environ:
        # The old one may still be taken, and answer for processes that are no more.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and os.path.exists(f"/proc/self/fd/{name}"):
            os.set_inheritable(int(name), False)
    os.execv(sys.executable, [sys.executable, "-m", "tfslurm.training.trainer", str(folder)])
