"""Bad input: the exit code of cli.md, one clear sentence, and nothing changed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

from tfslurm.catalog import db, queries
from tfslurm.catalog.models import Endpoint, Job, Submission, now
from tfslurm.files import locked

REPOSITORY = Path(__file__).parents[2]


def refused(done, code, said):
    """One sentence on stderr that says it, no traceback, nothing on stdout."""
    assert done.code == code, f"{done.code}: {done.stderr}{done.stdout}"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture
def furnished(installation):
    """A ready dataset, an assembling one, a base model, a completed job with its checkpoint."""
    installation.completed("first")
    installation.dataset("draft", ready=False)
    return installation


JOB = ("job", "create", "--model", "tiny", "--dataset", "chats")

REFUSALS = [
    (("nonsense",), 2, "No such command 'nonsense'"),
    (("dataset", "create", "x"), 2, "Missing option '--format'"),
    (("dataset", "create", "x", "--format", "csv"), 2, "'csv' is not one of"),
    (("dataset", "create", "x", "--format", "text", "--map", "text"), 2, "'text' is not CANONICAL=FIELD"),
    (("dataset", "list", "--limit", "0"), 2, "--limit"),
    (("model", "add", "x"), 2, "Name one source"),
    (("job", "create", "--model", "tiny"), 2, "Missing option '--dataset'"),
    ((*JOB, "--epochs", "many"), 2, "'many' is not a valid integer"),
    (("dataset", "show", "nothing"), 3, "no dataset 'nothing'"),
    (("dataset", "seal", "nothing"), 3, "no dataset 'nothing'"),
    (("job", "show", "nothing"), 3, "no job 'nothing'"),
    (("checkpoint", "show", "nothing"), 3, "no checkpoint 'nothing'"),
    (("endpoint", "show", "nothing"), 3, "no endpoint 'nothing'"),
    (("artifact", "show", "nothing"), 3, "no artifact 'nothing'"),
    (("model", "show", "nothing"), 3, "no base model 'nothing'"),
    (("lineage", "nothing"), 3, "no endpoint, checkpoint, job or dataset 'nothing'"),
    (("job", "create", "--model", "gpt", "--dataset", "chats"), 3, "no base model 'gpt'"),
    (("job", "create", "--model", "tiny", "--dataset", "nothing"), 3, "no dataset 'nothing'"),
    ((*JOB, "--instance", "huge"), 3, "no instance 'huge'"),
    (("endpoint", "create", "e", "--checkpoint", "nothing"), 3, "no checkpoint 'nothing'"),
    (("job", "create", "--model", "tiny", "--dataset", "draft"), 4, "dataset 'draft' is assembling, not ready"),
    ((*JOB, "--name", "first"), 4, "the name 'first' is taken by job"),
    (("dataset", "create", "chats", "--format", "text"), 4, "the name 'chats' is taken by dataset"),
    (("dataset", "import", "chats", __file__, "--format", "text"), 4, "the name 'chats' is taken by dataset"),
    (("dataset", "verify", "draft"), 4, "dataset 'draft' is assembling"),
    (("job", "stop", "first"), 4, "job 'first' has ended already: it is completed"),
    (("model", "add", "tiny", "--path", "/usr"), 4, "the base model 'tiny' is there already"),
    (("model", "remove", "tiny", "--yes"), 4, "in the lineage of job 'first'"),
    (("dataset", "create", "Bad Name", "--format", "text"), 5, "name 'Bad Name' is not allowed"),
    (("dataset", "create", "x", "--format", "text", "--map", "prompt=q"), 5, "The text format has no field 'prompt'"),
    (("dataset", "import", "x", "/nowhere", "--format", "text"), 5, "/nowhere"),
    (("dataset", "import", "x", "ftp://bucket/x", "--format", "text"), 5, "ftp:// cannot be imported"),
    (("dataset", "import", "x", __file__, "--format", "text", "--instance", "gpu-1"), 5, "is not for import"),
    ((*JOB, "--lora-rank", "0"), 5, "lora_rank 0 is not between 1 and 512"),
    ((*JOB, "--learning-rate", "nan"), 5, "learning_rate nan is not between"),
    ((*JOB, "--max-seq-length", "4096"), 5, "max_seq_length 4096 is not between 16 and 2048"),
    ((*JOB, "--epochs", "0", "--lora-alpha", "9999"), 5, "epochs 0 is not between 1 and 100; lora_alpha 9999"),
    ((*JOB, "--name", "../x"), 5, "name '../x' is not allowed"),
    ((*JOB, "--instance", "cpu"), 5, "instance 'cpu' is not for training"),
    (("endpoint", "create", "tiny", "--checkpoint", "first"), 5, "cannot be called like its base model"),
    (("endpoint", "create", "e", "--checkpoint", "first", "--max-context", "9999"), 5, "max-context 9999 is more"),
    (("--config", "/nowhere.yaml", "dataset", "list"), 5, "/nowhere.yaml: no such configuration file"),
    (("--root", "/nowhere", "dataset", "list"), 7, "no catalog at /nowhere/catalog.db"),
]


def test_what_cannot_be_done_is_refused_in_a_sentence_and_changes_nothing(furnished, cli):
    before = furnished.everything()
    for words, code, said in REFUSALS:
        refused(cli(*words), code, said)
        assert furnished.everything() == before, words
    assert not furnished.root.log.exists()


def test_a_broken_configuration_names_file_line_and_key(furnished, cli):
    furnished.config.write_text(furnished.config.read_text() + "slurm:\n  grace: soon\n")
    line = len(furnished.config.read_text().splitlines())
    refused(cli("dataset", "list"), 5, f"{furnished.config}:{line}: slurm.grace: expected 'float', got 'str'")


def test_a_bad_row_names_file_line_and_field_and_the_dataset_stays_assembling(installation, cli):
    made = installation.dataset("bad", ready=False, rows='{"messages": []}\n{"messages": [{"role": 3}]}\n')
    before = installation.everything()
    done = cli("dataset", "seal", "bad")
    assert done.code == 5
    assert "a.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert "role" in done.stderr or "messages" in done.stderr
    assert installation.everything() == before
    assert queries.find_dataset(made.artifact_id).artifact.status == "assembling"
    assert cli("dataset", "validate", *map(str, installation.root.assembling(made.artifact_id).iterdir()),
               "--format", "conversational").code == 5  # fmt: skip


def test_a_dataset_is_not_deleted_while_a_job_depends_on_it(installation, cli):
    job = installation.job("busy")
    before = installation.everything()
    refused(cli("dataset", "delete", "chats", "--yes"), 4, "dataset 'chats' is in use: job 'busy' (pending)")
    assert installation.everything() == before
    Job.update(status="stopped").where(Job.id == job.id).execute()
    assert cli("dataset", "delete", "chats", "--yes").code == 0
    refused(cli("dataset", "path", "chats"), 3, "no dataset 'chats'")
    refused(cli(*JOB), 3, "no dataset 'chats'")


def test_a_checkpoint_is_not_deleted_while_an_endpoint_serves_it(furnished, cli):
    endpoint = furnished.endpoint("helper", status="pending")
    before = furnished.everything()
    refused(cli("checkpoint", "delete", "first", "--yes"), 4, "is in use: endpoint 'helper' (pending)")
    refused(cli("endpoint", "delete", "helper", "--yes"), 4, "endpoint 'helper' is pending")
    refused(cli("endpoint", "create", "helper", "--checkpoint", "first"), 4, "the name 'helper' is taken by endpoint")
    refused(cli("endpoint", "chat", "helper", "hi"), 4, "endpoint 'helper' is pending")
    assert furnished.everything() == before
    Submission.update(state="ended").execute()
    Endpoint.update(status="stopped").where(Endpoint.id == endpoint.id).execute()
    assert cli("checkpoint", "delete", "first", "--yes").code == 0
    assert cli("endpoint", "delete", "helper", "--yes").code == 0
    assert cli("endpoint", "list", "--json").json() == []


def test_a_dataset_that_is_being_imported_can_neither_be_sealed_nor_deleted(installation, cli, program, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    installation.configure(environments={"core": str(program("python", "sleep 20"))})
    assert cli("dataset", "import", "copied", str(tmp_path / "rows.jsonl"), "--format", "text").code == 0
    refused(cli("dataset", "seal", "copied"), 4, "is being imported")
    refused(cli("dataset", "delete", "copied", "--yes"), 4, "is being imported")
    submission = Submission.get()
    os.killpg(int(submission.job_id.partition(":")[0]), signal.SIGKILL)


def test_a_question_that_is_not_answered_deletes_nothing(furnished):
    done = furnished.run("dataset", "delete", "draft", stdin="n\n")
    assert done.returncode == 130
    assert furnished.run("dataset", "delete", "draft", stdin="").returncode == 130
    assert queries.find_dataset("draft").artifact.status == "assembling"
    assert furnished.run("dataset", "delete", "draft", stdin="y\n").returncode == 0


def test_a_wait_that_takes_too_long_is_8_and_one_that_ends_badly_9(installation, cli):
    job = installation.job("slow")
    refused(cli("job", "wait", "slow", "--timeout", "0"), 8, "job 'slow' is still pending after 0 s")
    log = installation.root.job(job.id).log(0)
    log.write_text("line 1\nRuntimeError: out of luck\n")
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    installation.write_started(job)
    installation.write_exit(job, 1)
    done = cli("job", "wait", "slow")
    refused(done, 9, "job 'slow' is error: failed: exit code 1")
    assert "RuntimeError: out of luck" in done.stderr
    assert cli("job", "show", "slow", "--json").json()["log_tail"] == ["line 1", "RuntimeError: out of luck"]


def test_a_job_that_fails_while_its_maker_waits_is_9(installation, cli, program):
    installation.configure(environments={"train": str(program("python", "echo broken; exit 1")), "core": "/bin/true"})
    installation.plan()
    done = cli(*JOB, "--name", "doomed", "--wait")
    refused(done, 9, "job 'doomed' is error: failed: exit code 1")
    assert cli("checkpoint", "list", "--json").json() == []
    assert cli("job", "show", "doomed", "--json").json()["checkpoint"] is None


def test_an_unexpected_error_is_1_with_its_traceback_in_the_log_alone(installation, cli, monkeypatch):
    from tfslurm.catalog import views

    monkeypatch.setattr(views, "artifact_view", lambda row: 1 // 0)
    installation.dataset()
    done = cli("artifact", "list")
    refused(done, 1, "Error: unexpected ZeroDivisionError")
    assert str(installation.root.log) in done.stderr
    assert "ZeroDivisionError" in installation.root.log.read_text()
    assert "Traceback" in installation.root.log.read_text()


def test_a_slurm_that_cannot_be_reached_is_7_and_the_job_is_left_to_sync(installation, cli, monkeypatch, tmp_path):
    installation.plan()
    (tmp_path / "bin").mkdir()
    installation.configure(slurm={"command_timeout": 0.5})
    for name in ("sbatch", "squeue", "scontrol", "sinfo"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    refused(cli(*JOB, "--name", "later", "--instance", "gpu-1"), 7, "Unable to contact slurm controller")
    assert queries.find_job("later").status == "pending"
    assert Submission.get().state == "submitting"


def test_a_slurm_that_refuses_is_5_and_nothing_is_left_of_the_job(installation, cli, monkeypatch, tmp_path):
    installation.plan()
    before = installation.everything()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    (tmp_path / "bin" / "sinfo").write_text("#!/bin/sh\necho 'gpu*|infinite'\n")
    for name in ("sbatch", "sinfo"):
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    refused(cli(*JOB, "--name", "denied", "--instance", "gpu-1"), 5, "invalid account")
    assert installation.everything() == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run the command as somebody else")
def test_somebody_who_may_not_write_is_told_so_with_6(tmp_path):
    nobody = {"user": 65534, "group": 65534, "cwd": "/", "capture_output": True, "text": True}
    environ = {"PYTHONPATH": str(REPOSITORY), "HOME": "/nonexistent"}
    try:
        subprocess.run([sys.executable, "-c", "import tfslurm"], env=environ, check=True, **nobody)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("the user nobody cannot read this interpreter or this checkout")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-m", "tfslurm", "--root", folder / "root", "init"], env=environ, **nobody
        )
        assert done.returncode == 6, done.stderr
        assert "Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (folder / "root").exists()
    finally:
        shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_6(furnished, cli, monkeypatch):
    before = furnished.everything()

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    for words in (("dataset", "create", "x", "--format", "text"), (*JOB, "--name", "x"), ("init",)):
        refused(cli(*words), 6, "Permission denied")
    monkeypatch.undo()
    assert furnished.everything() == before


def test_a_catalog_that_may_not_be_written_is_6(furnished, cli, monkeypatch):
    monkeypatch.setitem(db.PRAGMAS, "query_only", 1)
    before = furnished.everything()
    refused(cli("dataset", "create", "x", "--format", "text"), 6, "the catalog is read-only for you")
    refused(cli(*JOB, "--name", "x"), 6, "the catalog is read-only for you")
    assert cli("dataset", "list").code == 0
    assert furnished.everything() == before


def test_sealing_waits_for_a_sealing_of_the_same_dataset(installation):
    made = installation.dataset("draft", ready=False)
    with locked(installation.root.dataset(f".lock-{made.artifact_id}")):
        environ = {**os.environ, "TFSLURM_CONFIG": str(installation.config)}
        command = [sys.executable, "-m", "tfslurm", "dataset", "seal", "draft"]
        waiting = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        assert queries.find_dataset("draft").artifact.status == "assembling"
    assert waiting.wait(20) == 0
    assert queries.find_dataset("draft").artifact.status == "ready"
