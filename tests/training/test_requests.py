from __future__ import annotations

import os
import signal
import threading

import pytest

from tfslurm.paths import JobPaths
from tfslurm.training.requests import Request, Requests, terminations


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture
def paths(tmp_path):
    return JobPaths(tmp_path)


@pytest.fixture
def make(paths):
    def requests(*, first=True, clock=None, terminated=None):
        terminated = terminated or threading.Event()
        return Requests(paths, terminated, first=first, save_seconds=60, clock=clock or Clock())

    return requests


def test_nothing_is_asked_where_nobody_asks(make):
    assert make().heard() is Request.NONE


def test_a_stop_wins_over_a_leave(make, paths):
    paths.leave.touch()
    assert make().heard() is Request.LEAVE
    paths.stop.touch()
    assert make().heard() is Request.STOP


def test_only_the_first_process_looks_at_the_files_and_at_the_clock(make, paths):
    clock = Clock()
    other = make(first=False, clock=clock)
    paths.stop.touch()
    paths.leave.touch()
    clock.time = 1000.0
    assert other.heard() is Request.NONE


def test_any_process_may_be_told_to_terminate(make):
    terminated = threading.Event()
    other = make(first=False, terminated=terminated)
    terminated.set()
    assert other.heard() is Request.LEAVE


def test_a_saving_is_due_so_long_after_the_last(make):
    clock = Clock()
    requests = make(clock=clock)
    clock.time = 59.0
    assert requests.heard() is Request.NONE
    clock.time = 60.0
    assert requests.heard() is Request.SAVE
    requests.saved()
    assert requests.heard() is Request.NONE
    clock.time = 120.0
    assert requests.heard() is Request.SAVE


def test_a_sigterm_is_noted_and_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with terminations() as terminated:
        assert not terminated.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
