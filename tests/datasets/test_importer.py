import json
import os
import subprocess
import sys

import pytest
from dataset_rows import ROWS

from tfslurm.artifacts import manifest
from tfslurm.datasets.importer import Reporter
from tfslurm.errors import EndedBadly
from tfslurm.paths import ImportPaths


@pytest.fixture
def start(tmp_path):
    """Run the importer as a process on a source; returns the process, its outcome and its paths."""

    def start(source, format="text", field_map=None, **environment):
        paths = ImportPaths(tmp_path / "imports")
        paths.folder.mkdir(exist_ok=True)
        config = {"dataset_id": "d1", "source": str(source), "format": format, "staging": str(tmp_path / "staging")}
        paths.config.write_text(json.dumps(config | {"field_map": field_map or {}}))
        command = [sys.executable, "-m", "tfslurm.datasets.importer", str(paths.folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        outcome = json.loads(paths.outcome.read_text()) if paths.outcome.exists() else None
        return done, outcome, paths

    return start


def test_an_import_stages_reports_progress_and_its_outcome(write, tmp_path, start):
    source = write({"question": "q", "answer": "a"})
    done, outcome, paths = start(source, "instruction", {"prompt": "question", "response": "answer"})
    assert (done.returncode, done.stderr) == (0, "")
    listed = manifest.read(tmp_path / "staging")
    assert (outcome["result"], outcome["digest"]) == ("succeeded", listed.digest)
    assert (outcome["size_bytes"], outcome["file_count"]) == (listed.size, 1)
    assert (outcome["report"]["rows"], outcome["report"]["schema"]) == (1, "prompt/response")
    progress = json.loads(paths.progress.read_text())
    assert progress["bytes_done"] == progress["bytes_total"] == listed.size
    assert progress["at"].endswith("Z")


def test_a_glob_imports_what_it_matches(write, tmp_path, start):
    source = write(ROWS["text"], name="train-1.jsonl")
    write(ROWS["text"], name="train-2.jsonl")
    write(ROWS["text"], name="test.jsonl")
    _, outcome, _ = start(f"{source}/train-*.jsonl")
    assert outcome["file_count"] == 2


def test_bad_rows_end_in_a_failed_outcome_with_the_report(write, tmp_path, start):
    done, outcome, _ = start(write({"text": 3}))
    assert done.returncode == 5
    assert outcome["result"] == "failed"
    assert "a.jsonl:1: $.text: expected a string" in outcome["error"]
    assert outcome["report"]["errors"] == {"field_type": 1}
    assert not (tmp_path / "staging").exists()


def test_a_missing_source_is_named(tmp_path, start):
    done, outcome, _ = start(tmp_path / "nowhere")
    assert done.returncode == 5
    assert outcome == {
        "result": "failed",
        "error": f"{tmp_path}/nowhere: no such file or folder, and no file matches it.",
        "report": None,
    }


def test_a_broken_configuration_is_named(tmp_path):
    paths = ImportPaths(tmp_path)
    paths.config.write_text('{"dataset_id": "d"}')
    command = [sys.executable, "-m", "tfslurm.datasets.importer", str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 5
    assert "import.json" in json.loads(paths.outcome.read_text())["error"]


def test_an_unexpected_error_leaves_its_traceback_in_the_log_and_a_line_in_the_outcome(write, tmp_path, start):
    source = write(ROWS["text"])
    (tmp_path / "imports").mkdir()
    (tmp_path / "imports/progress.json").mkdir()
    done, outcome, _ = start(source)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert outcome["error"].startswith("Unexpected: IsADirectoryError")
    assert "\n" not in outcome["error"]
    assert not (tmp_path / "staging").exists()


def test_a_killed_import_has_no_outcome_and_the_next_one_succeeds(write, tmp_path, start):
    source = write(ROWS["text"])
    done, outcome, _ = start(source, TFSLURM_FAULT="import-ingested")
    assert (done.returncode, outcome) == (-9, None)
    done, outcome, _ = start(source)
    assert (done.returncode, outcome["result"]) == (0, "succeeded")


def test_progress_is_written_once_an_interval_and_a_stop_is_obeyed(tmp_path):
    paths = ImportPaths(tmp_path)
    reporter = Reporter(paths, interval=3600)
    reporter(1, 10)
    reporter(2, 10)
    assert json.loads(paths.progress.read_text())["bytes_done"] == 1
    reporter(10, 10)
    assert json.loads(paths.progress.read_text())["bytes_done"] == 10
    paths.stop.touch()
    with pytest.raises(EndedBadly):
        Reporter(paths)(1, 10)


def test_the_importer_is_light_to_import():
    code = (
        "import sys, tfslurm.datasets.importer\n"
        "print([name for name in ('peewee', 'numpy', 'torch', 'submitit', 'click') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
