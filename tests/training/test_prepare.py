from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tfslurm.files import read_json
from tfslurm.training.plan import Plan
from tfslurm.training.prepare import main
from tfslurm.training.prepared import Prepared
from tfslurm.training.tokens import TokenFile


def test_preparing_tells_steps_and_tokens_before_training(make_job):
    job = make_job(epochs=3)
    job.prepare()
    prepared = Prepared.read(job.paths.prepared)
    assert (prepared.steps, prepared.steps_per_epoch, prepared.rows, prepared.examples) == (9, 3, 20, 60)
    tokens, plan = TokenFile(job.paths.folder / prepared.tokens), Plan.load(job.paths.plan)
    assert prepared.token_count == 3 * tokens.lengths.sum() == plan.tokens.sum()
    assert prepared.supervised_count == 3 * tokens.supervised(10**6).sum()


def test_a_second_job_on_the_same_data_does_not_tokenize_again(make_job, capsys):
    make_job("one").prepare()
    assert "tokenized in" in capsys.readouterr().out
    make_job("two", max_seq_length=30, seed=3).prepare()
    assert "tokenized in" not in capsys.readouterr().out


def test_overlong_and_rejected_rows_are_told_by_number(make_job):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the cat " * 60}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": [{"role": "user", "content": "the cat " * 60}, {"role": "assistant", "content": "b"}]},
    ]
    job = make_job(rows=rows, max_seq_length=60)
    job.prepare()
    prepared = read_json(job.paths.prepared)
    assert prepared["truncated"] == {"count": 1, "first": [0]}
    assert prepared["dropped"] == {"count": 1, "first": [3]}
    assert prepared["rejected"] == {"no token of it carries loss": {"count": 1, "first": [2]}}
    assert prepared["rows"] == 2


def test_bytes_that_are_not_those_sealed_fail_the_job_before_it_tokenizes(make_job):
    job = make_job()
    with open(job.paths.folder.parent / "job-dataset" / "rows.jsonl", "a") as file:
        file.write("\n")
    assert main([str(job.paths.folder)]) == 5
    assert "rows.jsonl" in read_json(job.paths.outcome)["error"]
    assert not job.paths.prepared.exists() and not job.paths.plan.exists()


def test_a_dataset_with_nothing_to_learn_fails_the_job_and_says_why(make_job):
    job = make_job(rows=[{"messages": [{"role": "user", "content": "a"}]}])
    assert main([str(job.paths.folder)]) == 5
    assert "1 rejected: no token of it carries loss" in read_json(job.paths.outcome)["error"]
    assert not job.paths.prepared.exists()


def test_an_outcome_of_an_earlier_attempt_is_removed(make_job):
    job = make_job()
    job.paths.outcome.write_text(json.dumps({"result": "failed", "error": "earlier"}))
    job.prepare()
    assert not job.paths.outcome.exists()


def test_a_success_of_an_earlier_attempt_is_kept(make_job):
    job = make_job()
    job.prepare()
    assert job.train_here() == 0
    before = job.paths.outcome.read_bytes()
    job.paths.prepared.unlink()
    job.prepare()
    assert job.paths.outcome.read_bytes() == before and not job.paths.prepared.exists()


def test_the_plan_is_for_the_processes_that_will_run(make_job, monkeypatch):
    job = make_job(world=2)
    job.prepare()
    assert Plan.load(job.paths.plan).world_size == 2
    monkeypatch.setenv("TFSLURM_WORLD_SIZE", "3")
    job.prepare()
    assert Plan.load(job.paths.plan).world_size == 3


def test_attempts_that_came_to_nothing_are_not_repeated_for_ever(make_job, monkeypatch):
    job = make_job()
    monkeypatch.setenv("TFSLURM_BARREN_ATTEMPTS", "2")
    for attempt, code in enumerate((0, 0, 5)):
        monkeypatch.setenv("TFSLURM_ATTEMPT", str(attempt))
        assert main([str(job.paths.folder)]) == code
    outcome = read_json(job.paths.outcome)
    assert (outcome["result"], outcome["attempt"]) == ("failed", 2)
    assert "2 attempts in a row ended before they had saved anything" in outcome["error"]


def test_two_jobs_may_prepare_the_same_dataset_at_once(make_job):
    jobs = [make_job("one"), make_job("two")]
    command = [sys.executable, "-m", "tfslurm.training.prepare"]
    running = [subprocess.Popen([*command, str(job.paths.folder)]) for job in jobs]
    assert [process.wait(120) for process in running] == [0, 0]
    files = {Prepared.read(job.paths.prepared).tokens for job in jobs}
    assert len(files) == 1 and len(TokenFile(next(iter(files)))) == 20
    assert len(list((jobs[0].paths.folder.parent / "tokens").iterdir())) == 1


@pytest.mark.parametrize(
    ("format", "row", "field_map"),
    [
        ("instruction", {"question": "hello", "answer": "world"}, {"prompt": "question", "response": "answer"}),
        ("text", {"text": "the cat sat on the mat"}, {}),
        ("pretokenized", {"input_ids": [20, 21, 22], "labels": [-100, 21, 22]}, {}),
    ],
)
def test_every_format_is_prepared(make_job, format, row, field_map):
    job = make_job(rows=[row] * 3, format=format, field_map=field_map)
    job.prepare()
    assert Prepared.read(job.paths.prepared).rows == 3
