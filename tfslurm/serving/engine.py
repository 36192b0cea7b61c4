"""The engine's processes: started as one group, ended as one group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tfslurm.files import tail
from tfslurm.serving import launch


class Engine:
    """A running engine in a process group of its own, which dies with this process (see `launch`).

    Must be ended by `stop` or `kill`, also after it has exited by itself: its children may be left.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._ended = False
        self._log_start = log.stat().st_size if log.exists() else 0
        reader, self._lifeline = os.pipe()
        try:
            with open(log, "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", launch.__file__, str(reader), *command],
                    env=environment,
                    cwd=log.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(reader,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(reader)

    @property
    def pid(self) -> int:
        """Of the server, which is also the group's id."""
        return self._process.pid

    def exited(self) -> str | None:
        """How it ended, as words that follow "the engine"; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def stop(self, seconds: float, *, tick: Callable[[], None] = lambda: None) -> bool:
        """Ask it to drain and leave; kill what is left after `seconds`. True where it left by itself.

        `tick` is called a few times a second while it drains.
        """
        if self._process.poll() is None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            tick()
        left = self._process.poll() is not None
        self.kill()
        return left

    def kill(self, *, patience: float = 10.0) -> None:
        """SIGKILL to the whole group, and wait until it is gone; a stopped process dies of it too."""
        if self._ended:
            return  # The group's id may belong to others by now.
        _signal_group(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)
        self._ended = True
        deadline = time.monotonic() + patience
        while group(self.pid) and time.monotonic() < deadline:
            time.sleep(0.05)

    def last_lines(self, secret: str, lines: int = 12) -> list[str]:
        """The end of what this engine wrote, without `secret`.

        vLLM prints the cause of a failed start long before its last line, so the first errors
        stand at the front, and what its libraries print at exit is left out.
        """
        size = self._log.stat().st_size - self._log_start if self._log.exists() else 0
        written = tail(self._log, 100_000, limit=min(size, 1024 * 1024)) if size else []
        written = [line.replace(secret, "***")[:500] for line in written if line.strip()]
        useful = [line for line in written if not _is_noise(line)]
        end = useful[-lines:]
        causes = [line for line in useful[: -len(end)] if "Error: " in line or "error: " in line]
        return list(dict.fromkeys(causes[:3])) + end


def group(pgid: int) -> list[int]:
    """Processes of a group that are not zombies."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, _, of_group = text.rpartition(")")[2].split()[:3]
            if int(of_group) == pgid and state not in "ZX":
                members.append(int(entry))
    return members


def _signal_group(pgid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        pass  # Nothing of it is left, which is what was asked for.


def _is_noise(line: str) -> bool:
    return line.startswith(("nanobind: ", " - leaked ", " - ... skipped", "See https://nanobind"))
