"""`checkpoint export`: the bytes of a checkpoint, its card, and what a crash leaves; merging is in test_merging."""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.models import BaseModel, Dataset
from tfslurm.errors import InvalidError, NotFoundError, StatusError
from tfslurm.files import locked
from tfslurm.training.checkpoints import delete
from tfslurm.training.export import TEMPORARY, export


@pytest.fixture
def checkpoint(installation):
    installation.completed("first")
    return queries.find_checkpoint("first")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "my exports"
    folder.mkdir()
    return folder


def head(folder):
    """The front matter of the card."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_bytes_are_the_checkpoints_and_its_manifest_checks_them(installation, checkpoint, out):
    made = export(installation.settings, checkpoint, out / "adapter")
    source = installation.root.checkpoint(checkpoint.artifact_id)
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint.json"):
        assert (out / "adapter" / name).read_bytes() == (source / name).read_bytes()
    assert (made.destination, made.agreement) == (out / "adapter", None)
    manifest.verify_folder(out / "adapter", made.digest)
    subprocess.run(["sha256sum", "--check", "--quiet", "MANIFEST.sha256"], cwd=out / "adapter", check=True)
    assert os.listdir(out) == ["adapter"]


def test_the_export_is_the_users_own_with_the_rights_of_the_users_umask(installation, checkpoint, out):
    before = os.umask(0o027)
    try:
        export(installation.settings, checkpoint, out / "adapter")
    finally:
        os.umask(before)
    assert (out / "adapter").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (out / "adapter").iterdir()} == {0o640}


def test_the_card_states_the_lineage_in_the_hubs_terms(installation, checkpoint, out):
    export(installation.settings, checkpoint, out / "adapter")
    job = checkpoint.job
    text = (out / "adapter" / "README.md").read_text()
    for said in (job.id, job.base_model_revision, job.dataset.artifact.digest, checkpoint.artifact.digest,
                 '"learning_rate": 0.0002', '"lora_rank": 16'):  # fmt: skip
        assert said in text
    assert head(out / "adapter") == {
        "base_model": "tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:tiny", "lora", "transformers", "tfslurm"],
    }
    assert str(installation.folder) not in text


def test_a_base_model_and_a_dataset_of_the_hub_are_named_as_they_are_there(installation, checkpoint, out):
    BaseModel.update(source="hf://meta/Llama@" + "a" * 40).execute()
    Dataset.update(source="hf://datasets/acme/books@main/data/train.jsonl").execute()
    export(installation.settings, queries.find_checkpoint("first"), out / "adapter")
    assert head(out / "adapter")["base_model"] == "meta/Llama"
    assert head(out / "adapter")["datasets"] == ["acme/books"]


def test_an_empty_folder_is_filled_and_anything_else_is_left_alone(installation, checkpoint, out):
    (out / "empty").mkdir()
    export(installation.settings, checkpoint, out / "empty")
    (out / "link").symlink_to(out / "nowhere")
    (out / "file").write_text("mine")
    for name in ("empty", "link", "file"):
        with pytest.raises(StatusError, match="exists already"):
            export(installation.settings, checkpoint, out / name)
    with pytest.raises(NotFoundError, match="no such folder"):
        export(installation.settings, checkpoint, out / "no" / "where")
    assert sorted(os.listdir(out)) == ["empty", "file", "link"] and (out / "file").read_text() == "mine"


def test_changed_bytes_are_named_and_nothing_is_exported(installation, checkpoint, out):
    weights = installation.root.checkpoint(checkpoint.artifact_id) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes().swapcase())
    with pytest.raises(InvalidError, match="adapter_model.safetensors: its bytes have changed"):
        export(installation.settings, checkpoint, out / "adapter")
    assert os.listdir(out) == []


def test_a_deleted_checkpoint_is_not_exported(installation, checkpoint, out):
    with pytest.raises(StatusError, match="is deleted"):
        export(installation.settings, delete(checkpoint), out / "adapter")
    assert os.listdir(out) == []


@pytest.mark.parametrize("point", ["export-file-copied", "export-settled", "export-renamed"])
def test_a_killed_export_leaves_the_destination_whole_or_missing_and_the_next_one_cleans_up(
    installation, checkpoint, out, point
):
    words = ("checkpoint", "export", "first", str(out / "adapter"))
    assert installation.run(*words, TFSLURM_FAULT=point).returncode == -9
    left = set(os.listdir(out))
    if point == "export-renamed":
        assert left == {"adapter", f"{TEMPORARY}adapter"}
        manifest.check_names(out / "adapter", manifest.read(out / "adapter"))
        remove_tree(out / "adapter")
    else:
        assert left == {f"{TEMPORARY}adapter"}
    installation.run(*words, check=0)
    assert os.listdir(out) == ["adapter"]
    manifest.check_names(out / "adapter", manifest.read(out / "adapter"))


def test_two_exports_to_the_same_place_do_not_mix(installation, checkpoint, out):
    around = out / f"{TEMPORARY}adapter"
    around.mkdir()
    (around / "files").mkdir()
    with locked(around / "lock"), pytest.raises(StatusError, match="another export to .* is running"):
        export(installation.settings, checkpoint, out / "adapter")
    assert (around / "files").is_dir() and not (out / "adapter").exists()


def test_the_command_says_where_it_is_and_gives_scripts_the_digests(installation, checkpoint, out):
    done = installation.run("checkpoint", "export", "first", str(out / "a"), check=0)
    assert done.stdout.startswith(f"checkpoint 'first' is at {out / 'a'}: adapter, ")
    assert done.stderr == ""
    view = installation.json("checkpoint", "export", "first", str(out / "b"))
    assert view["checkpoint_digest"] == checkpoint.artifact.digest
    assert (view["location"], view["merged"], view["agreement"]) == (str(out / "b"), False, None)
    assert view["digest"] == manifest.read(out / "b").digest
    again = installation.run("checkpoint", "export", "first", str(out / "a"), check=4)
    assert f"Error: {out / 'a'} exists already" in again.stderr
    assert "no checkpoint 'none'" in installation.run("checkpoint", "export", "none", str(out / "c"), check=3).stderr


def test_a_checkpoint_of_another_revision_of_the_base_is_not_merged(installation, checkpoint, out):
    BaseModel.update(revision="r2").execute()
    with pytest.raises(StatusError, match="trained on revision r1 of 'tiny'; the one that is staged is r2"):
        export(installation.settings, queries.find_checkpoint("first"), out / "model", merged=True)
    assert os.listdir(out) == []
