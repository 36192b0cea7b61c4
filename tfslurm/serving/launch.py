"""Become a command whose whole process group dies with the process that started it.

    python -I launch.py DESCRIPTOR COMMAND …

DESCRIPTOR is the read end of a pipe whose write end only the starter holds, so its end of file
means that the starter is gone, however it died. A forked watcher waits for that and kills the
group, while this process becomes COMMAND: its pid and exit status are the starter's to see.

PR_SET_PDEATHSIG alone would not do: it reaches one process, and vLLM's EngineCore outlives the
kill -9 of its parent with the model in memory (seen with vLLM 0.32).
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    if os.fork() == 0:
        watch(lifeline)
    os.close(lifeline)
    os.execvp(command[0], command)


def watch(lifeline: int) -> None:
    """Never returns. A SIGTERM to the group asks the engine to drain; the watcher stays for that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(lifeline, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
