"""Several processes that share work whose results are wanted in order, in bounded memory.

Threads would not do: decoding rows holds the interpreter's lock. The workers are forked, so that
they start at once and have all that the caller has; they take the next task from one pipe as they
come free, and send what they find through a pipe each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from tfslurm.errors import EndedBadly

T = TypeVar("T")
M = TypeVar("M")
Work = Callable[[T], Iterator[M]]

AHEAD = 4
"""Messages of a task that wait for their turn; its worker stops sending then."""
_KEPT = 24 * 1024 * 1024
_NUMBER = struct.Struct("=q")


def window(workers: int) -> int:
    """How many tasks are under way at most: `number % window` is one of them alone."""
    return 4 * workers


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(tasks: Sequence[T], work: Work[T, M], workers: int) -> Iterator[tuple[T, M]]:
    """What `work` yields for each task, in the order of the tasks; with one worker, in this process.

    No task is started before what was yielded for the `window` before it has been asked past, so
    that a task may use room that an earlier one left. What `work` raises is raised here, in its
    turn. Closing the iterator, or an error, kills the workers and waits for them. Raises EndedBadly
    where a worker is killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            for message in work(task):
                yield task, message
        return
    crew = _Crew(tasks, work, min(workers, len(tasks)))
    try:
        for number, task in enumerate(tasks):
            crew.hand_out(upto=number + window(workers))
            for message in crew.messages(number):
                yield task, message
    finally:
        crew.dismiss()


class _End(NamedTuple):
    """A task is done, or `error` ended it."""

    error: BaseException | None = None


class _Crew(Generic[T, M]):
    def __init__(self, tasks: Sequence[T], work: Work[T, M], count: int) -> None:
        self._total, self._handed_out = len(tasks), 0
        self._waiting: dict[int, deque[Any]] = {}
        self._at: dict[Connection, int] = {}
        self._workers: dict[Connection, BaseProcess] = {}
        taken, self._given = os.pipe()
        try:
            for _ in range(count):
                self._start(tasks, work, taken)
        except BaseException:
            self.dismiss()
            raise
        finally:
            os.close(taken)

    def _start(self, tasks: Sequence[T], work: Work[T, M], taken: int) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        arguments = (
            tasks,
            work,
            taken,
            sender,
            [self._given, *(other.fileno() for other in self._at), receiver.fileno()],
        )
        process = multiprocessing.get_context("fork").Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        self._workers[receiver], self._at[receiver] = process, -1

    def hand_out(self, upto: int) -> None:
        """Let the workers take all tasks before `upto`."""
        while self._handed_out < min(upto, self._total):
            os.write(self._given, _NUMBER.pack(self._handed_out))
            self._handed_out += 1

    def messages(self, number: int) -> Iterator[M]:
        """What a task yields, as it comes; its error is raised."""
        while True:
            arrived = self._waiting.setdefault(number, deque())
            while not arrived:
                self._receive(number)
            message = arrived.popleft()
            if not isinstance(message, _End):
                yield message
                continue
            del self._waiting[number]
            if message.error:
                raise message.error
            return

    def _receive(self, current: int) -> None:
        """One message of each worker that has some, but none whose task is too far ahead."""
        backlog = {number for number, arrived in self._waiting.items() if len(arrived) >= AHEAD and number != current}
        for connection in wait([at for at, number in self._at.items() if number not in backlog]):
            try:
                number, message = connection.recv()
            except (EOFError, OSError):
                self._died(connection)
            self._at[connection] = number
            self._waiting.setdefault(number, deque()).append(message)

    def _died(self, connection: Connection) -> None:
        process = self._workers[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "Perhaps there was too little memory; try again." if code == -signal.SIGKILL else "Try again."
        raise EndedBadly(f"A process that did a part of the work {how}.", hint=hint)

    def dismiss(self) -> None:
        os.close(self._given)
        for process in self._workers.values():
            process.kill()
        for connection, process in self._workers.items():
            process.join()
            process.close()
            connection.close()


def _work(tasks: Sequence[T], work: Work[T, M], taken: int, sender: Connection, others: list[int]) -> None:
    """A worker's life. It ends with the parent, whose ends of the pipes it must not keep open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in others:
        os.close(descriptor)
    bytes(_KEPT)  # glibc gives memory back to the kernel only above twice the largest block freed so far
    try:
        while given := os.read(taken, _NUMBER.size):
            (number,) = _NUMBER.unpack(given)
            try:
                for message in work(tasks[number]):
                    sender.send((number, message))
                end = _End()
            except Exception as error:
                end = _End(error)
            sender.send((number, end))
    except BrokenPipeError:
        pass
