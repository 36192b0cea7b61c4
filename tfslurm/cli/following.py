"""Printing logs, and what is still being written to them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

INTERVAL = 0.5
"""Seconds between two looks at a log."""


def print_logs(folder: Path, pattern: str, ended: Callable[[], bool] | None) -> None:
    """Print the logs in `folder` one after the other; with `ended`, go on until it says so."""
    done: dict[Path, int] = {}
    while True:
        last = ended is None or ended()
        for log in sorted(folder.glob(pattern)):
            done[log] = _print_from(log, done.get(log, 0))
        sys.stdout.flush()
        if last:
            return
        time.sleep(INTERVAL)


def _print_from(log: Path, offset: int) -> int:
    with open(log, "rb") as file:
        file.seek(offset)
        while block := file.read(1 << 16):
            sys.stdout.buffer.write(block)
            offset += len(block)
    return offset
