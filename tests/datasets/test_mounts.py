"""Mounts: read-only views that keep a dataset from being deleted as long as they last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfslurm import settings as configuration
from tfslurm.catalog import queries
from tfslurm.catalog.db import connect, write_transaction
from tfslurm.catalog.models import Dataset, Mount
from tfslurm.datasets import mounts, registry, sealing
from tfslurm.errors import InvalidError, NotFoundError, StatusError
from tfslurm.installation import install
from tfslurm.settings import Settings

ROW = '{"text": "hello"}\n'


@pytest.fixture
def site(tmp_path: Path) -> Settings:
    settings = configuration.load(root=tmp_path / "root", environ={})
    install(settings)
    connect(settings)
    return settings


@pytest.fixture
def dataset(site: Settings) -> Dataset:
    made = registry.create(site, "notes", "text", {})
    (Path(made.artifact.location) / "a.jsonl").write_text(ROW)
    return sealing.seal(site, made)


def test_a_link_shows_the_files_and_keeps_the_dataset(dataset: Dataset, tmp_path: Path) -> None:
    mounts.link(dataset, tmp_path / "data")
    assert (tmp_path / "data" / "a.jsonl").read_text() == ROW
    with pytest.raises(StatusError, match=f"mounted at {tmp_path}/data"):
        registry.delete(dataset)
    assert queries.find_dataset("notes").artifact.status == "ready"


def test_a_link_that_was_removed_by_hand_keeps_nothing(dataset: Dataset, tmp_path: Path) -> None:
    mounts.link(dataset, tmp_path / "data")
    os.unlink(tmp_path / "data")
    registry.delete(dataset)
    assert queries.find_dataset("notes", deleted=True).artifact.status == "deleted"


def test_unmount_removes_the_link_and_frees_the_dataset(dataset: Dataset, tmp_path: Path) -> None:
    mounts.link(dataset, tmp_path / "data")
    mounts.unmount(tmp_path / "data")
    assert not os.path.lexists(tmp_path / "data")
    registry.delete(dataset)


def test_unmount_leaves_alone_what_somebody_put_in_the_place_of_the_link(dataset: Dataset, tmp_path: Path) -> None:
    mounts.link(dataset, tmp_path / "data")
    os.unlink(tmp_path / "data")
    (tmp_path / "data").write_text("mine")
    mounts.unmount(tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"


def test_what_is_not_mounted_cannot_be_unmounted(site: Settings, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no dataset is mounted"):
        mounts.unmount(tmp_path)


def test_a_place_that_is_taken_is_refused_and_stays_as_it_was(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(InvalidError, match="exists already"):
        mounts.link(dataset, tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"
    assert Mount.select().count() == 0


def test_an_assembling_dataset_is_not_mounted(site: Settings, tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="assembling, not ready"):
        mounts.link(registry.create(site, "more", "text", {}), tmp_path / "data")
    assert not os.path.lexists(tmp_path / "data")


def test_containers_get_a_quoted_read_only_option(dataset: Dataset) -> None:
    location = dataset.artifact.location
    assert mounts.option(dataset, Path("/data"), "apptainer") == f"--bind={location}:/data:ro"
    assert mounts.option(dataset, Path("/my data"), "pyxis") == f"--container-mounts='{location}:/my data:ro'"


BOTH = pytest.mark.parametrize("tool", ["bwrap", "unshare"])


def only(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which(tool):
        pytest.skip(f"NOT TESTED: bind mounts with {tool}, which is not installed")
    which = shutil.which
    monkeypatch.setattr(mounts.shutil, "which", lambda name: which(name) if name == tool else None)


@BOTH
def test_a_bind_mount_is_read_only_even_for_root_and_ends_with_its_command(
    dataset: Dataset, tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    only(tool, monkeypatch)
    place = tmp_path / "data"
    script = f"cat {place}/a.jsonl; chmod u+w {place} {place}/a.jsonl; echo x >> {place}/a.jsonl || exit 7"
    assert mounts.run_bound(dataset, place, ["sh", "-c", script]) == 7
    assert ROW in capfd.readouterr().out
    assert not place.exists()
    assert (Path(dataset.artifact.location) / "a.jsonl").read_text() == ROW
    registry.delete(dataset)


def test_a_dataset_is_kept_while_a_bind_mount_lasts_and_free_when_its_process_is_killed(
    site: Settings, dataset: Dataset, tmp_path: Path
) -> None:
    if not (shutil.which("bwrap") or shutil.which("unshare")):
        pytest.skip("NOT TESTED: bind mounts: neither bwrap nor unshare is installed")
    command = ["dataset", "mount", "notes", str(tmp_path / "data"), "--how", "bind", "--", "sleep", "60"]
    running = subprocess.Popen([sys.executable, "-m", "tfslurm", "--root", str(site.root.path), *command])
    try:
        deadline = time.monotonic() + 20
        while not Mount.select().exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(StatusError, match="mounted at"):
            registry.delete(dataset)
        with pytest.raises(StatusError, match="in use by process"):
            mounts.unmount(tmp_path / "data")
    finally:
        running.kill()
        running.wait()
    registry.delete(dataset)


def test_a_mount_on_another_host_counts_and_the_refusal_says_that_it_cannot_be_seen(
    dataset: Dataset, tmp_path: Path
) -> None:
    mount = mounts.link(dataset, tmp_path / "data")
    os.unlink(tmp_path / "data")
    with write_transaction():
        Mount.update(host="elsewhere", how="bind", process="1:1").where(Mount.id == mount.id).execute()
    with pytest.raises(StatusError, match="on elsewhere, which cannot be seen from here"):
        registry.delete(dataset)
    mounts.unmount(tmp_path / "data")
    registry.delete(dataset)
