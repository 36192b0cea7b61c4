from __future__ import annotations

from tfslurm.errors import InvalidError
from tfslurm.files import read_json
from tfslurm.paths import JobPaths
from tfslurm.training.outcome import Failed, Stopped, has_succeeded, read_outcome, reporting, write_outcome


def test_a_known_failure_is_told_in_its_own_words_with_its_exit_code(tmp_path):
    def body():
        raise InvalidError("the rows are wrong", hint="look at row 3")

    assert reporting(tmp_path / "outcome.json", body) == 5
    error = "the rows are wrong\nlook at row 3"
    assert read_json(tmp_path / "outcome.json") == {"result": "failed", "error": error, "attempt": 0}


def test_a_failure_tells_its_attempt_and_the_log_of_the_process_that_failed(tmp_path):
    def body():
        raise InvalidError("the rows are wrong")

    path, log = tmp_path / "outcome.json", JobPaths(tmp_path).rank_log(2, 3)
    assert reporting(path, body, attempt=2, log=log) == 5
    assert read_outcome(path) == Failed(error="the rows are wrong\nsee logs/attempt-2.rank-3.log", attempt=2)


def test_an_unexpected_failure_is_one_line_and_a_traceback_in_the_log(tmp_path, capsys):
    def body():
        raise RuntimeError("out of luck\nand more")

    assert reporting(tmp_path / "outcome.json", body) == 1
    assert read_outcome(tmp_path / "outcome.json") == Failed(error="RuntimeError: out of luck")
    assert "Traceback" in capsys.readouterr().err


def test_what_failed_first_stays(tmp_path):
    write_outcome(tmp_path / "outcome.json", Failed(error="first"))

    def body():
        raise RuntimeError("second")

    assert reporting(tmp_path / "outcome.json", body) == 1
    assert read_outcome(tmp_path / "outcome.json") == Failed(error="first")


def test_success_writes_nothing_by_itself(tmp_path):
    assert reporting(tmp_path / "outcome.json", lambda: 0) == 0
    assert read_outcome(tmp_path / "outcome.json") is None


def test_a_stop_tells_the_step(tmp_path):
    write_outcome(tmp_path / "outcome.json", Stopped(step=4))
    assert read_json(tmp_path / "outcome.json") == {"result": "stopped", "step": 4, "attempt": 0}


def test_the_body_says_the_exit_code(tmp_path):
    assert reporting(tmp_path / "outcome.json", lambda: 75) == 75


def test_an_outcome_of_before_there_were_attempts_can_be_read(tmp_path):
    (tmp_path / "outcome.json").write_text('{"result": "failed", "error": "first"}')
    assert read_outcome(tmp_path / "outcome.json") == Failed(error="first", attempt=0)


def test_only_a_success_with_its_adapter_counts_as_one(tmp_path):
    paths = JobPaths(tmp_path)
    assert not has_succeeded(paths)
    paths.outcome.write_text('{"result": "failed", "error": "first"}')
    assert not has_succeeded(paths)
    paths.outcome.write_text("{")
    assert not has_succeeded(paths)
    adapter = '{"lora_rank": 1, "target_modules": [], "files": {}}'
    counts = '"examples": 1, "tokens": 1, "peak_memory_bytes": 1'
    paths.outcome.write_text(f'{{"result": "succeeded", "steps": 1, "final_loss": 1, "adapter": {adapter}, {counts}}}')
    assert not has_succeeded(paths)
    paths.adapter.mkdir()
    assert has_succeeded(paths)


def test_a_process_that_only_saw_another_one_die_leaves_the_cause_to_it(tmp_path, capsys):
    def body():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:7553.")

    assert reporting(tmp_path / "outcome.json", body) == 1
    assert read_outcome(tmp_path / "outcome.json") is None
    assert "Connection closed" in capsys.readouterr().err
