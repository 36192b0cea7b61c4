from __future__ import annotations

import msgspec
import pytest

from tfslurm.files import read_json
from tfslurm.training.progress import Reporter


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def report(tmp_path):
    """Reports the steps `first` to `last` of 10, 100 tokens each, `seconds` apart, as an attempt of its own."""

    def run(first, last, *, seconds=2.0, attempt=0, norm=1.0):
        clock = Clock()
        left = (10 - first + 1) * 100
        files = tmp_path / "progress.json", tmp_path / "metrics.jsonl"
        reporter = Reporter(*files, steps=10, tokens=left, clock=clock, start=first - 1, attempt=attempt)
        for step in range(first, last + 1):
            clock.time += seconds
            reporter.step(
                step,
                epoch=1,
                loss=1 / step,
                learning_rate=1e-3,
                grad_norm=norm,
                tokens=100,
                supervised=10,
                peak_memory=1,
            )
        return reporter

    return run


def lines(tmp_path):
    return [msgspec.json.decode(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]


def test_every_step_is_a_line_and_progress_is_the_last(tmp_path, report):
    report(1, 4)
    assert [(line["step"], line["attempt"], line["tokens_per_second"]) for line in lines(tmp_path)] == [
        (step, 0, 50.0) for step in (1, 2, 3, 4)
    ]
    progress = read_json(tmp_path / "progress.json")
    assert (progress["step"], progress["steps"], progress["loss"]) == (4, 10, 0.25)
    assert (progress["tokens_per_second"], progress["eta_seconds"]) == (50.0, 12.0)


def test_what_is_trained_once_more_is_reported_once(tmp_path, report):
    report(1, 6)
    report(5, 7, attempt=2)
    assert [(line["step"], line["attempt"]) for line in lines(tmp_path)] == [
        *((step, 0) for step in (1, 2, 3, 4)),
        *((step, 2) for step in (5, 6, 7)),
    ]


def test_progress_is_there_before_the_first_step_of_an_attempt_that_goes_on(tmp_path, report):
    report(1, 6)
    report(5, 4, attempt=1)
    progress = read_json(tmp_path / "progress.json")
    assert (progress["step"], progress["loss"]) == (4, 0.25)
    assert (progress["tokens_per_second"], progress["eta_seconds"]) == (50.0, 12.0)
    assert len(lines(tmp_path)) == 4


def test_speed_and_time_left_are_this_attempt_s_own(tmp_path, report):
    report(1, 6)
    report(7, 8, seconds=20.0, attempt=1)
    progress = read_json(tmp_path / "progress.json")
    assert (progress["tokens_per_second"], progress["eta_seconds"]) == (5.0, 40.0)


def test_an_attempt_from_the_start_begins_the_files_anew(tmp_path, report):
    report(1, 6)
    report(1, 0, attempt=1)
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "progress.json").exists()


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path, report):
    report(1, 4)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"attempt":0,"step":5,"ep')
    report(5, 5, attempt=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_norm_that_overflowed_is_kept_as_null(tmp_path, report):
    report(1, 4, norm=float("inf"))
    report(4, 3, attempt=1)
    assert [line["grad_norm"] for line in lines(tmp_path)] == [None] * 3


def test_a_state_whose_metrics_are_lost_still_goes_on(tmp_path, report):
    report(5, 6, attempt=1).sync()
    assert [line["step"] for line in lines(tmp_path)] == [5, 6]


def test_metrics_can_be_synced_before_the_first_line(tmp_path, report):
    report(1, 0).sync()
    assert lines(tmp_path) == []
