"""Remote imports and standard input through the product: the command, the script, the importer, and sync."""

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from web_server import WebServer, text_rows

from tfslurm.artifacts.manifest import verify_folder
from tfslurm.catalog import queries
from tfslurm.catalog.models import Dataset, Submission, now
from tfslurm.datasets import importing, spooling
from tfslurm.datasets.download import CHUNK
from tfslurm.errors import InvalidError, StatusError
from tfslurm.slurm import local
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate

ROWS = text_rows(200_000)
SECRET = "0123456789abcdef"


@pytest.fixture
def server():
    made = WebServer()
    yield made
    made.close()
    for submission in Submission.select():
        if submission.job_id:
            local.end(submission.job_id, signal.SIGKILL)


@pytest.fixture
def finished(installation, until):
    def finished(name="copied", lock=True):
        def ended():
            assert not installation.sync().failed
            row = queries.find_dataset(name, deleted=True)
            return row if row.artifact.status != "assembling" else None

        row = until(ended, 40)
        paths = installation.root.import_(row.artifact_id)
        until(lambda: not any(local.alive(submission.job_id) for submission in Submission.select()))
        assert not paths.spool.exists() and not paths.source.exists() and not (lock and paths.lock.exists())
        return row

    return finished


def said(installation) -> bytes:
    """All that is written under the root, the catalog included."""
    return b"".join(path.read_bytes() for path in installation.root.path.rglob("*") if path.is_file())


def test_a_download_that_is_killed_goes_on_where_it_was(installation, server, finished, until):
    data, gate = text_rows(6 * CHUNK), threading.Event()
    held = {f"bytes={start}-" for start in range(3 * CHUNK, len(data), CHUNK)}

    def hold(file, span):
        if f"{span.partition('-')[0]}-" in held:
            gate.wait(30)

    url = server.add("/data.jsonl", data, before=hold)
    made = importing.start(installation.settings, "copied", "text", {}, url)
    journal = installation.root.import_(made.artifact_id).spool / "journal.jsonl"
    until(lambda: journal.exists() and journal.read_text().count('"chunk"') == 3)
    shown = installation.json("dataset", "show", "copied")["progress"]
    assert (shown["phase"], shown["bytes_total"]) == ("download", len(data))
    newest = Submission.get()
    local.end(newest.job_id, signal.SIGKILL)
    until(lambda: not local.alive(newest.job_id))
    before = len(server.requests)
    gate.set()
    row = finished()
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    again = sorted(int(span[6:].partition("-")[0]) for _, span, _ in server.requests[before:] if span != "bytes=0-0")
    assert again == list(range(3 * CHUNK, len(data), CHUNK))  # the first three chunks were not fetched again
    log = installation.root.import_(made.artifact_id).log(0).read_text()
    assert f"fetched {len(data) - 3 * CHUNK:,} bytes from {url}" in log
    verify_folder(installation.root.dataset(row.artifact_id), row.artifact.digest)
    assert (installation.root.dataset(row.artifact_id) / "data.jsonl").read_bytes() == data
    assert [event.change for event in queries.events_of(row.artifact_id)] == ["created", "resumed", "ready"]


def test_a_signed_url_and_a_password_are_written_nowhere_but_in_one_file_while_it_lasts(
    installation, server, finished, until
):
    gate = threading.Event()
    login = "Basic dTowMTIzNDU2Nzg5YWJjZGVm"
    server.add("/data.jsonl", ROWS, login=login, before=lambda file, span: gate.wait(20))
    given = f"http://u:{SECRET}@{server.place}/data.jsonl?X-Amz-Signature={SECRET}"
    done = installation.run("dataset", "import", "copied", given, "--format", "text", "--json", check=0)
    assert json.loads(done.stdout)["source"] == f"http://{server.place}/data.jsonl"
    paths = installation.root.import_(Dataset.get().artifact_id)
    assert (paths.source.stat().st_mode & 0o777, paths.source.read_text()) == (0o600, given)
    paths.source.rename(paths.source.with_name("kept"))
    secret = paths.source.with_name("kept").read_text()
    assert said(installation).count(SECRET.encode()) == secret.count(SECRET)
    paths.source.with_name("kept").rename(paths.source)
    gate.set()
    row = finished()
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    assert not paths.source.exists()
    assert SECRET.encode() not in said(installation)
    assert SECRET not in done.stdout + done.stderr + json.dumps(installation.json("dataset", "show", "copied"))
    assert any(f"?X-Amz-Signature={SECRET}" in path for path, *_ in server.requests)


@pytest.mark.parametrize("fault", ["refused", "rows", "unexpected"])
def test_an_import_that_fails_tells_no_secret_either(installation, server, finished, fault, program):
    url = server.add("/data.jsonl", b'{"text": 3}\n', faults=[403] * 9 if fault == "refused" else [])
    if fault == "unexpected":
        body = f'[[ $2 == tfslurm ]] || mkdir -p "${{@: -1}}/progress.json"; exec {sys.executable} "$@"'
        installation.configure(environments={"core": str(program("python", body))})
    installation.run("dataset", "import", "copied", f"{url}?sig={SECRET}", "--format", "text", check=0)
    row = finished()
    assert row.artifact.status == "error"
    assert {"refused": "403 Forbidden", "rows": "data.jsonl:1", "unexpected": "IsADirectory"}[
        fault
    ] in row.artifact.error
    assert SECRET.encode() not in said(installation)


@pytest.mark.parametrize(
    ("point", "status", "attempts"),
    [("import-outcome", "ready", 1), ("import-chunk", "ready", 2), ("import-listed", "error", 3)],
)
def test_an_importer_that_is_killed_at_the_same_place_every_time(
    installation, server, finished, monkeypatch, point, status, attempts
):
    monkeypatch.setenv("TFSLURM_FAULT", point)
    url = f"{server.add('/data.jsonl', ROWS)}?sig={SECRET}"
    installation.run("dataset", "import", "copied", url, "--format", "text", check=0, TFSLURM_FAULT=point)
    row = finished(lock=False)
    assert (row.artifact.status, Submission.select().count()) == (status, attempts)
    assert status == "ready" or row.artifact.error == "the import failed: exit code 137 (attempt 3 of 3)"
    assert SECRET.encode() not in said(installation)
    assert installation.root.dataset(row.artifact_id).exists() == (status == "ready")


@pytest.mark.parametrize("point", ["import-spooled", "import-written", "import-recorded"])
def test_a_command_that_is_killed_before_it_has_started_the_import(installation, server, finished, point):
    words = ("dataset", "import", "copied", "-", "--format", "text")
    killed = installation.run(*words, stdin=ROWS.decode(), TFSLURM_FAULT=point)
    assert killed.returncode == -signal.SIGKILL
    assert Dataset.select().count() == (point == "import-recorded")
    if point == "import-recorded":
        Submission.update(created_at=now() - timedelta(hours=1)).execute()
    else:
        installation.run(*words, stdin=ROWS.decode(), check=0)
    row = finished()
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    spooling.sweep(installation.root)
    assert not list(installation.root.path.glob("imports/.*"))


@pytest.mark.parametrize(
    ("launcher", "fate", "code", "again"),
    [
        ("slurm", Fate.INFRASTRUCTURE, None, True),
        ("slurm", Fate.LOST, None, True),
        ("slurm", Fate.TIMEOUT, None, True),
        ("slurm", Fate.PREEMPTED, None, True),
        ("slurm", Fate.FAILED, 137, True),
        ("slurm", Fate.FAILED, 143, False),
        ("local", Fate.FAILED, 143, True),
        ("slurm", Fate.FAILED, 1, False),
        ("slurm", Fate.OUT_OF_MEMORY, 137, False),
        ("slurm", Fate.CANCELLED, 143, False),
        ("local", Fate.COMPLETED, 0, False),
    ],
)
def test_what_was_ended_from_outside_is_submitted_again(installation, server, monkeypatch, launcher, fate, code, again):
    monkeypatch.setattr(importing.submissions, "hand_over", lambda *_: None)
    made = importing.start(installation.settings, "copied", "text", {}, server.add("/data.jsonl", ROWS))
    Submission.update(launcher=launcher).execute()
    importing.follow(
        installation.settings,
        queries.find_dataset(Submission.get().object_id),
        Submission.get(),
        Observation(fate, "so", exit_code=code),
    )
    assert queries.find_dataset(made.artifact_id).artifact.status == ("assembling" if again else "error")
    assert Submission.select().count() == 1 + again


def test_an_unexpected_error_of_the_command_itself_logs_no_secret(installation, server):
    url = server.add("/data.jsonl", ROWS)
    (installation.root.path / "imports").chmod(0o755)
    installation.root.path.joinpath("imports").rename(installation.root.path / "elsewhere")
    installation.root.path.joinpath("imports").write_text("no folder")
    done = installation.run("dataset", "import", "copied", f"{url}?sig={SECRET}", "--format", "text", check=1)
    assert installation.root.log.exists()
    assert SECRET.encode() not in said(installation) + (done.stdout + done.stderr).encode()


def test_what_comes_on_standard_input_is_kept_and_imported(installation, server, finished):
    made = installation.run(
        "dataset", "import", "copied", "-", "--format", "text", "--json", stdin=ROWS.decode(), check=0
    )
    assert json.loads(made.stdout)["source"] == "standard input"
    row = finished()
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    assert (installation.root.dataset(row.artifact_id) / "stdin.jsonl").read_bytes() == ROWS
    assert row.artifact.producer == "import from standard input"


def test_standard_input_survives_the_kill_of_its_import(installation, server, finished, tmp_path, program):
    once = f"if [[ $2 != tfslurm && ! -e {tmp_path}/killed ]]; then touch {tmp_path}/killed; kill -9 $$; fi"
    installation.configure(environments={"core": str(program("python", f'{once}; exec {sys.executable} "$@"'))})
    installation.run("dataset", "import", "copied", "-", "--format", "text", stdin=ROWS.decode(), check=0)
    assert finished().artifact.status == "ready"


def test_compressed_standard_input_is_named_as_what_it_is(installation, server, finished, tmp_path):
    import gzip

    (tmp_path / "x").write_bytes(gzip.compress(ROWS))
    with open(tmp_path / "x", "rb") as stream:
        seen = []
        importing.start(
            installation.settings, "copied", "text", {}, "-", stream=stream, progress=lambda *pair: seen.append(pair)
        )
    assert seen[-1] == (len(gzip.compress(ROWS)),) * 2
    row = finished()
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    assert [path.name for path in installation.root.dataset(row.artifact_id).glob("*.gz")] == ["stdin.jsonl.gz"]


def test_bad_rows_on_standard_input_are_said_to_be_there(installation, server, finished):
    installation.run("dataset", "import", "copied", "-", "--format", "text", stdin='{"text": 3}\n', check=0)
    assert finished().artifact.error.startswith("standard input: ")


def test_a_command_that_is_killed_while_it_reads_leaves_nothing_registered(installation, until):
    before = installation.everything()
    command = [sys.executable, "-m", "tfslurm", "--config", str(installation.config)]
    command += ["dataset", "import", "copied", "-", "--format", "text"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"HOME": str(installation.folder)})
    process.stdin.write(ROWS * 20)
    process.stdin.flush()
    incoming = installation.root.path / "imports"
    until(lambda: [path for path in incoming.glob(".incoming-*/spool/objects/stdin.jsonl") if path.stat().st_size])
    assert spooling.sweep(installation.root) == []  # it is at it
    process.kill()
    process.wait()
    process.stdin.close()
    assert Dataset.select().count() == 0
    assert len(spooling.sweep(installation.root)) == 1
    assert installation.everything() == before


def test_a_command_that_is_interrupted_while_it_reads_removes_it_all(installation, until):
    before = installation.everything()

    class Interrupted:
        def __init__(self):
            self.blocks = [ROWS, ROWS]

        def fileno(self):
            return 0

        def read(self, size):
            if not self.blocks:
                raise KeyboardInterrupt
            return self.blocks.pop()

    with pytest.raises(KeyboardInterrupt):
        importing.start(installation.settings, "copied", "text", {}, "-", stream=Interrupted())
    assert installation.everything() == before


@pytest.mark.parametrize("stdin", ["", None])
def test_empty_standard_input_is_refused(installation, stdin):
    before = installation.everything()
    installation.run("dataset", "import", "copied", "-", "--format", "text", stdin=stdin, check=5)
    assert installation.everything() == before


def test_a_taken_name_is_refused_before_anything_is_read(installation, server):
    installation.dataset("copied")
    with pytest.raises(StatusError, match="is taken"):
        importing.start(installation.settings, "copied", "text", {}, "-", stream=object())


def test_a_missing_package_is_refused_before_anything_is_registered(installation, monkeypatch):
    before = installation.everything()
    monkeypatch.setattr("tfslurm.datasets.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidError) as raised:
        importing.start(installation.settings, "copied", "text", {}, "s3://bucket/a.jsonl")
    assert raised.value.hint == "pip install 'tfslurm[s3]'"
    assert installation.everything() == before


def test_the_help_has_an_example_of_each_kind(installation):
    told = installation.run("dataset", "import", "--help", check=0).stdout
    for start in ("s3://", "gs://", "hf://datasets/", "https://", " - --format", "/shared/"):
        assert start in told
