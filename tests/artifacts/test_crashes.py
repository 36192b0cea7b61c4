"""kill -9 at every step, in a process of its own; then `sync` and `reclaim`, and nothing is wrong or lost.

And the disk that is full, on a filesystem that really is.
"""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from tfslurm.artifacts.fsck import examine
from tfslurm.artifacts.manifest import verify_folder
from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.reclaim import reclaim
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, Lease, Submission, now
from tfslurm.datasets import registry
from tfslurm.slurm import local

TEXT = '{"text": "Once upon a time."}\n'


def killed(installation, point, *words):
    """Run a command that dies at `point`: that it got there is part of the test."""
    done = installation.run(*words, TFSLURM_FAULT=point)
    assert done.returncode == -signal.SIGKILL, f"{point} was not reached\n{done.stdout}{done.stderr}"
    Lease.update(expires_at=now()).execute()  # of the one that is dead


def sound(installation):
    """After the next sync catalog and bytes agree; so they do after a reclaim and both graces, with no trash left."""

    def check(days):
        findings = list(examine(installation.settings, full=True, at=now() + timedelta(days=days)))
        assert not findings, findings
        for row in Artifact.select().where(Artifact.status == "ready"):
            verify_folder(Path(row.location), row.digest)

    assert not installation.sync().failed
    check(0)
    for days in (8, 11):
        done = reclaim(installation.settings, at=now() + timedelta(days=days))
        assert done.ran and not done.failed, done.failed
        check(days + 2)
    assert os.listdir(installation.root.trash) == []


SEALING = [
    "ingest-copied", "ingest-validated", "ingest-listed", "publish-synced", "publish-read-only", "publish-renamed",
    "seal-published", "seal-marked", "seal-ready",
]  # fmt: skip


@pytest.mark.parametrize("point", SEALING)
@pytest.mark.parametrize("sealed_again", [True, False])
def test_seal(installation, point, sealed_again):
    installation.dataset("other")
    made = installation.dataset(ready=False)
    killed(installation, point, "dataset", "seal", "chats")
    status = queries.find_dataset("chats").artifact.status
    assert status == ("ready" if point == "seal-ready" else "assembling")
    if sealed_again:
        installation.run("dataset", "seal", "chats", check=0)
    sound(installation)
    folder = installation.root.assembling(made.artifact_id)
    if sealed_again or status == "ready":
        assert not folder.exists()
        assert os.listdir(installation.root.path / "assembling") == []
    else:
        assert (folder / "a.jsonl").exists()
        assert installation.root.dataset(made.artifact_id).exists() is False
        assert installation.json("dataset", "seal", "chats")["status"] == "ready"


def test_create(installation):
    killed(installation, "create-reserved", "dataset", "create", "chats", "--format", "text")
    assert len(os.listdir(installation.root.path / "assembling")) == 1
    installation.run("dataset", "create", "chats", "--format", "text", check=0)
    sound(installation)
    assert os.listdir(installation.root.path / "assembling") == [queries.find_dataset("chats").artifact_id]


@pytest.mark.parametrize("point", ["delete-marked", "deleted"])
def test_delete(installation, point):
    made = installation.dataset()
    killed(installation, point, "dataset", "delete", "chats", "--yes")
    (row,) = Artifact.select()
    assert row.status == ("deleted" if point == "deleted" else "ready")
    assert installation.root.dataset(made.artifact_id).exists()
    if row.status == "deleted":
        installation.run("dataset", "restore", "chats", check=0)
    sound(installation)
    registry.delete(queries.find_dataset("chats"))
    sound(installation)
    assert not installation.root.dataset(made.artifact_id).exists()


def test_restore(installation):
    registry.delete(installation.dataset())
    killed(installation, "restore-marked", "dataset", "restore", "chats")
    assert Artifact.get().status == "deleted"
    installation.run("dataset", "restore", "chats", check=0)
    sound(installation)
    assert Artifact.get().status == "ready"


RECLAIMING = [
    "reclaim-marked", "reclaim-claimed", "trash-unlocked", "trash-renamed",
    "trash-counted", "tree-part-removed", "trash-removed",
]  # fmt: skip


@pytest.mark.parametrize("point", RECLAIMING)
def test_reclaim(installation, point):
    kept, draft = installation.dataset("kept"), installation.dataset("draft", ready=False)
    gone = registry.delete(installation.dataset())
    installation.configure(reclaim={"grace": 0, "trash_grace": 0})
    if point in RECLAIMING[4:]:
        installation.run("reclaim", check=0)
    killed(installation, point, "reclaim")
    claimed = Artifact.get_by_id(gone.artifact_id).reclaimed_at is not None
    assert claimed == (point != "reclaim-marked")
    if not claimed:
        installation.run("dataset", "restore", "chats", check=0)
        registry.delete(gone)
    sound(installation)
    assert not installation.root.dataset(gone.artifact_id).exists()
    assert queries.find_dataset(gone.artifact_id, deleted=True).artifact.reclaimed_at
    assert {queries.find_dataset(row.artifact_id).artifact.status for row in (kept, draft)} == {"ready", "assembling"}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        (tmp_path / "source" / f"{name}.jsonl").write_text(TEXT)
    return tmp_path / "source"


@pytest.fixture
def ended():
    """End whatever an import left running."""
    yield
    for submission in Submission.select():
        if submission.job_id:
            local.end(submission.job_id, signal.SIGKILL)


def without_sync(program):
    """A node that cannot reach the catalog: the sync that is killed is then the first."""
    return str(program("python", f'[[ $2 == tfslurm ]] || exec {sys.executable} "$@"'))


@pytest.mark.parametrize("point", ["import-written", "import-recorded", "submission-handed"])
def test_the_start_of_an_import(installation, source, program, until, ended, point):
    installation.configure(environments={"core": without_sync(program)}, slurm={"command_timeout": 0.01})
    killed(installation, point, "dataset", "import", "copied", str(source), "--format", "text")

    def done():
        assert not installation.sync().failed
        return not list(queries.submissions_alive())

    until(done)
    statuses = [row.status for row in Artifact.select()]
    assert statuses == ([] if point == "import-written" else ["ready"])
    sound(installation)
    assert len(os.listdir(installation.root.path / "datasets")) == len(statuses)
    assert os.listdir(installation.root.path / "imports") == []


IMPORTING = [
    "publish-synced", "publish-read-only", "publish-renamed", "import-published", "import-marked", "import-ready",
]  # fmt: skip


@pytest.mark.parametrize("point", IMPORTING)
def test_the_publication_of_an_import(installation, source, program, until, ended, point):
    installation.configure(environments={"core": without_sync(program)})
    made = installation.json("dataset", "import", "copied", str(source), "--format", "text")
    until(installation.root.import_(made["id"]).exit.exists)
    killed(installation, point, "sync")
    assert queries.find_dataset("copied").artifact.status == ("ready" if point == "import-ready" else "assembling")
    sound(installation)
    assert queries.find_dataset("copied").artifact.status == "ready"
    assert os.listdir(installation.root.path / "datasets") == [made["id"]]


@pytest.mark.parametrize("point", ["ingest-copied", "ingest-listed", "import-ingested"])
def test_an_import_that_dies_on_its_node_goes_on(installation, source, program, until, ended, tmp_path, point):
    died = tmp_path / "died"
    node = program(
        "python",
        f"""if [[ $2 == tfslurm.datasets.importer && ! -e '{died}' ]]; then
          touch '{died}'
          export TFSLURM_FAULT={point}
        fi
        exec {sys.executable} "$@" """,
    )
    installation.configure(environments={"core": str(node)})
    made = installation.json("dataset", "import", "copied", str(source), "--format", "text")

    def done():
        assert not installation.sync().failed
        return not list(queries.submissions_alive())

    until(done)
    assert died.exists()
    sound(installation)
    assert queries.find_dataset("copied").artifact.status == "ready"
    assert os.listdir(installation.root.path / "datasets") == [made["id"]]


REGISTERING = [
    "register-copied", "publish-synced", "publish-read-only", "publish-renamed", "register-published",
    "register-marked", "register-ready",
]  # fmt: skip


@pytest.mark.parametrize("point", REGISTERING)
def test_the_registration_of_a_checkpoint(installation, point):
    job = installation.job()
    from tfslurm.artifacts import manifest
    from tfslurm.catalog.models import BaseModel

    folder = installation.root.model("tiny")
    listed = manifest.build(folder)
    manifest.write(listed, folder)
    BaseModel.update(digest=listed.digest).execute()
    installation.trained(job)
    killed(installation, point, "sync")
    sound(installation)
    assert queries.find_job("first").status == "completed"
    checkpoint = queries.find_checkpoint("first").artifact
    verify_folder(installation.root.checkpoint(checkpoint.id), checkpoint.digest)
    assert os.listdir(installation.root.path / "checkpoints") == [checkpoint.id]


@pytest.fixture
def small(installation, tmp_path):
    """Mount a tmpfs of so many bytes and files over the installation's datasets/."""
    if os.getuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    folder = installation.root.path / "datasets"

    def mount(size, files):
        options = f"size={size},nr_inodes={files}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine lets nobody mount a tmpfs: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], check=False)


def refused_for_room(installation, folder):
    before = installation.everything()
    done = installation.run("dataset", "seal", "chats", check=7)
    assert "Traceback" not in done.stderr and str(folder) in done.stderr
    assert "Make room" in done.stderr
    assert installation.everything() == before


def test_a_disk_that_is_too_small_is_said_before_and_works_with_room(installation, small):
    made = installation.dataset(ready=False, rows=conversations(20_000))
    folder = small("4m", 1000)
    filler = folder / "filler"
    filler.write_bytes(bytes(3_500_000))
    refused_for_room(installation, folder)
    filler.unlink()
    sealed = installation.json("dataset", "seal", "chats")
    assert sealed["status"] == "ready"
    verify_folder(installation.root.dataset(made.artifact_id), sealed["digest"])
    remove_tree(installation.root.dataset(made.artifact_id))


def test_a_disk_that_fills_on_the_way_leaves_nothing_half_published(installation, small):
    made = installation.dataset(ready=False)
    for number in range(40):
        (installation.root.assembling(made.artifact_id) / f"{number}.jsonl").write_text(conversations(1))
    folder = small("4m", 60)
    for number in range(30):
        (folder / f"filler-{number}").touch()
    refused_for_room(installation, folder)
    for filler in folder.glob("filler-*"):
        filler.unlink()
    sealed = installation.json("dataset", "seal", "chats")
    assert (sealed["status"], sealed["file_count"]) == ("ready", 41)
    verify_folder(installation.root.dataset(made.artifact_id), sealed["digest"])
    remove_tree(installation.root.dataset(made.artifact_id))


def conversations(count):
    return '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n' * count
