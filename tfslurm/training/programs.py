"""Programs of the training environment that a command runs and waits for: a login node's own has no torch.

A program is a module whose `main` gets its words; what it is asked comes as JSON on its standard input, where that is
more than a few words. The last line of its standard output is its answer as JSON, or a `Failure`; its exit code is
then the error's. Progress goes to stderr, which is the command's own.

`python -m tfslurm.training.programs MODULE WORDS` runs one.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec

from tfslurm.errors import ConfigurationError, TfslurmError
from tfslurm.settings import Settings

T = TypeVar("T", bound=msgspec.Struct)

_KINDS = {kind.exit_code: kind for kind in TfslurmError.__subclasses__()}
_PR_SET_PDEATHSIG = 1


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error of ours, on its way from one process to the other."""

    error: str
    hint: str | None = None


def ask(
    settings: Settings,
    module: str,
    *words: str,
    answer: type[T],
    question: msgspec.Struct | None = None,
    online: bool = False,
) -> T:
    """Run the program MODULE with its words in the training environment; its answer.

    Raises the error that the program ended with, ConfigurationError where there is no such environment, and
    TfslurmError where the program crashed or was killed. Unless `online`, it may not ask the Hub.
    """
    python = settings.python("train")
    environment = os.environ if online else os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [python, "-m", "tfslurm.training.programs", module, *words],
            input=b"" if question is None else msgspec.json.encode(question),
            stdout=subprocess.PIPE,
            env=environment,
        )
    except OSError as error:
        raise ConfigurationError(
            f"the training environment's Python, {python}, cannot be run: {error.strerror}",
            hint="Set environments.train in site.yaml; `tfslurm doctor` checks it.",
        ) from error
    line = (done.stdout.splitlines() or [b""])[-1]
    if done.returncode:
        raise _error(python, module, done.returncode, line)
    return msgspec.json.decode(line, type=answer)


def _error(python: str, module: str, code: int, line: bytes) -> TfslurmError:
    try:
        said = msgspec.json.decode(line, type=Failure)
    except msgspec.MsgspecError:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "Not enough memory on this machine?" if code == -signal.SIGKILL else "The reason stands above."
        return TfslurmError(f"{module} {how} in the training environment, {python}", hint=hint)
    return _KINDS.get(code, TfslurmError)(said.error, hint=said.hint)


def read_question(kind: type[T]) -> T:
    """In the program: what it is asked."""
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)


def answering(body: Callable[[], msgspec.Struct]) -> int:
    """In the program: print the answer, or the error of ours that came instead; the exit code."""
    try:
        return _say(body())
    except TfslurmError as error:
        return _say(Failure(error.message, error.hint), error.exit_code)
    except ModuleNotFoundError as error:
        return _say_missing(error)
    except KeyboardInterrupt:
        return 130  # the command that asked was interrupted too, and says so


def _say(what: msgspec.Struct, code: int = 0) -> int:
    print(msgspec.json.encode(what).decode(), flush=True)
    return code


def _say_missing(error: ModuleNotFoundError) -> int:
    hint = f"Install tfslurm[train] in the environment of {sys.executable}, or set environments.train to another."
    failure = Failure(f"the training environment lacks the Python package {error.name}", hint)
    return _say(failure, ConfigurationError.exit_code)


def main(module: str, *words: str) -> int:
    """Run a program; the kernel kills it when the command that asked dies, so that nothing goes on writing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return _say_missing(error)
    return program.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
