"""Printing logs, and what is still being written to them.

A line is printed once and whole, whichever log it comes from. As `tail -f` of several files does, a header on
stderr says when the file changes; stdout has the logs' own bytes and nothing else.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

INTERVAL = 0.5
"""Seconds between two looks at the logs."""

SETTLE = 2.0
"""Seconds after the end, and after its last line, in which more may still come: the script writes on when its program
has ended, and a filesystem of the network shows it late."""

LINE = 1 << 16
"""Bytes after which a line that goes on is printed nevertheless."""


def print_logs(folder: Path, pattern: str, ended: Callable[[], bool] | None = None, tail: int | None = None) -> int:
    """Print the logs in `folder` whose names match the regular expression; how many there were.

    With `ended`, go on until it says so, also with logs that appear later. `tail` is how many lines of each log
    that is there already are printed, None being all. An interrupt ends the following with exit code 130.
    """
    printer = _Printer(folder, re.compile(pattern))
    try:
        printer.skip(tail)
        if ended is None or ended():
            printer.look(last=True)
        else:
            _follow(printer, ended)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    return len(printer.offsets)


def _follow(printer: _Printer, ended: Callable[[], bool]) -> None:
    over, quiet_since = False, time.monotonic()
    while True:
        # Asked first: what was written before the end is then printed by the look that follows.
        over = over or ended()
        if printer.look() or not over:
            quiet_since = time.monotonic()
        if over and time.monotonic() - quiet_since >= SETTLE:
            printer.look(last=True)
            return
        time.sleep(INTERVAL)


class _Printer:
    """Prints what has been added to logs since it last looked."""

    def __init__(self, folder: Path, pattern: re.Pattern[str]) -> None:
        self.folder, self.pattern = folder, pattern
        self.offsets: dict[Path, int] = {}
        self.shown: Path | None = None
        self.broken = False
        """Whether the last byte printed is in the middle of a line."""

    def logs(self) -> list[Path]:
        """In the order of their numbers: attempt 2 comes before attempt 10, and its first process before the others."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [self.folder / name for name in sorted(names, key=_numbered) if self.pattern.fullmatch(name)]

    def skip(self, tail: int | None) -> None:
        """Leave out all but the last lines of the logs that are there."""
        for log in self.logs() if tail is not None else ():
            self.offsets[log] = start_of_tail(log, tail)

    def look(self, last: bool = False) -> bool:
        """Print what is new, and with `last` also a line that nobody ended; whether anything was."""
        logs = self.logs()
        printed = False
        for log in logs:
            printed |= self._print(log, last, several=len(logs) > 1)
        sys.stdout.flush()
        return printed

    def _print(self, log: Path, last: bool, several: bool) -> bool:
        offset = start = self.offsets.setdefault(log, 0)
        try:
            file = open(log, "rb")
        except FileNotFoundError:
            return False  # a network's filesystem lists it before it has it; the next look will
        with file:
            file.seek(offset)
            while block := file.read(LINE):
                part = block if last else block[: _whole(block)]
                if not part:
                    break
                self._header(log, several)
                sys.stdout.buffer.write(part)
                offset += len(part)
                self.broken = part[-1:] not in (b"\n", b"\r")
                file.seek(offset)
        self.offsets[log] = offset
        return offset > start

    def _header(self, log: Path, several: bool) -> None:
        if log == self.shown:
            return
        if several or self.shown:
            if self.broken:
                sys.stdout.buffer.write(b"\n")
            sys.stdout.flush()
            click.echo(f"==> {log.stem} <==", err=True)
        self.shown, self.broken = log, False


def names_of_job_logs(attempt: int | None, rank: int | None) -> str:
    """The regular expression of the logs of a job's attempt and rank, None being all; of all, also what Slurm said."""
    number = "[0-9]+" if attempt is None else str(attempt)
    if rank == 0:
        return rf"attempt-{number}\.log"
    others = rf"attempt-{number}\.rank-{'[0-9]+' if rank is None else rank}\.log"
    if rank is not None:
        return others
    return rf"attempt-{number}\.log|{others}" + (r"|slurm\.log" if attempt is None else "")


def _whole(block: bytes) -> int:
    """Where the last whole line of a block ends, a bar that is written over being one; a long line is cut."""
    end = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1
    return end or (len(block) if len(block) == LINE else 0)


def _numbered(name: str) -> list[str | int]:
    # Words and numbers alternate, so that no word is ever compared with a number.
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def start_of_tail(path: Path, lines: int) -> int:
    """The offset at which the last `lines` lines of a file begin; read from its end."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        if not lines:
            return end
        end -= 1  # a newline at the very end closes the last line and begins none
        while end > 0:
            start = max(0, end - LINE)
            file.seek(start)
            block = file.read(end - start)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                lines -= 1
                if not lines:
                    return start + at + 1
            end = start
    return 0


class _Rank(click.ParamType):
    """A process's number, or None for "all"."""

    name = "rank"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "all" else click.IntRange(0).convert(value, param, ctx)


rank_option = click.option(
    "--rank",
    type=_Rank(),
    default="all",
    show_default=True,
    metavar="N|all",
    help="The process whose output is wanted, 0 being the first.",
)
