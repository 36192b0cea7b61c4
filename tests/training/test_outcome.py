from __future__ import annotations

from tfslurm.errors import InvalidError
from tfslurm.files import read_json
from tfslurm.training.outcome import Failed, Stopped, read_outcome, reporting, write_outcome


def test_a_known_failure_is_told_in_its_own_words_with_its_exit_code(tmp_path):
    def body():
        raise InvalidError("the rows are wrong", hint="look at row 3")

    assert reporting(tmp_path / "outcome.json", body) == 5
    assert read_json(tmp_path / "outcome.json") == {"result": "failed", "error": "the rows are wrong\nlook at row 3"}


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
    assert reporting(tmp_path / "outcome.json", lambda: None) == 0
    assert read_outcome(tmp_path / "outcome.json") is None


def test_a_stop_tells_the_step(tmp_path):
    write_outcome(tmp_path / "outcome.json", Stopped(step=4))
    assert read_json(tmp_path / "outcome.json") == {"result": "stopped", "step": 4}


def test_a_process_that_only_saw_another_one_die_leaves_the_cause_to_it(tmp_path, capsys):
    def body():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:7553.")

    assert reporting(tmp_path / "outcome.json", body) == 1
    assert read_outcome(tmp_path / "outcome.json") is None
    assert "Connection closed" in capsys.readouterr().err
