"""Taking a deletion back: it is again what it was, or it is refused and nothing is changed."""

from datetime import timedelta

import pytest

from tfslurm.artifacts.manifest import verify_folder
from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.reclaim import reclaim
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, now
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import seal
from tfslurm.errors import InvalidError, StatusError
from tfslurm.training import checkpoints


def fields(artifact):
    return {name: value for name, value in artifact.__data__.items()}


def events(artifact_id):
    return [(event.change, event.from_status, event.to_status) for event in queries.events_of(artifact_id)]


def refused(installation, row, error, said):
    before = installation.everything()
    restore = registry.restore if row.artifact.kind == "dataset" else checkpoints.restore
    with pytest.raises(error, match=said):
        restore(row)
    assert installation.everything() == before


@pytest.mark.parametrize("status", ["assembling", "ready", "error"])
def test_a_dataset_is_again_what_it_was(installation, status):
    made = installation.dataset(ready=status == "ready")
    if status == "error":
        Artifact.update(status="error", error="bad rows").execute()
    before = fields(queries.find_dataset("chats").artifact)
    registry.delete(made)
    restored = registry.restore(queries.find_dataset("chats", deleted=True))
    assert fields(queries.find_dataset("chats").artifact) == fields(restored.artifact) == before
    assert events(made.artifact_id)[-2:] == [("deleted", status, "deleted"), (status, "deleted", status)]


def test_a_restored_dataset_can_be_sealed_and_trained_on(installation):
    made = installation.dataset(ready=False)
    sealed = seal(installation.settings, registry.restore(registry.delete(made)))
    registry.restore(registry.delete(sealed))
    verify_folder(installation.root.dataset(made.artifact_id), sealed.artifact.digest)
    assert installation.completed().status == "completed"


def test_restoring_one_that_is_not_deleted_changes_nothing(installation):
    made = installation.dataset()
    before = installation.everything()
    assert registry.restore(made).artifact.status == "ready"
    assert installation.everything() == before


def test_a_name_that_was_given_away_is_not_taken_back(installation):
    old = registry.delete(installation.dataset(ready=False))
    new = installation.dataset(ready=False)
    refused(installation, old, StatusError, f"'chats' is taken by dataset {new.artifact_id}")
    registry.delete(new)
    assert registry.restore(old).artifact.status == "assembling"


def test_one_whose_name_was_given_away_is_restored_under_another(installation):
    old = installation.dataset()
    installation.run("dataset", "delete", "chats", "--yes", check=0)
    new = installation.dataset(ready=False)
    before = installation.everything()
    for name, code in (("chats", 4), ("Not Allowed", 5), ("ds-0123456789abcdef", 5)):
        installation.run("dataset", "restore", "chats", "--as", name, check=code)
    assert installation.everything() == before
    restored = installation.json("dataset", "restore", "chats", "--as", "chats-2025")
    assert (restored["id"], restored["name"], restored["status"]) == (old.artifact_id, "chats-2025", "ready")
    assert queries.find_dataset("chats").artifact_id == new.artifact_id
    assert queries.events_of(old.artifact_id)[-1].reason == "restored; it was called 'chats'"
    verify_folder(installation.root.dataset(old.artifact_id), restored["digest"])


def test_only_a_deleted_one_gets_a_new_name(installation):
    made = installation.dataset()
    before = installation.everything()
    assert registry.restore(made, "chats").artifact.name == "chats"
    with pytest.raises(StatusError, match="'chats' is ready: only a deleted one"):
        registry.restore(made, "notes")
    assert installation.everything() == before


def test_a_checkpoint_gets_another_name_too(installation):
    installation.completed()
    installation.run("checkpoint", "delete", "first", "--yes", check=0)
    restored = installation.json("checkpoint", "restore", "first", "--as", "first-again")
    assert (restored["name"], restored["status"]) == ("first-again", "ready")
    assert queries.find_checkpoint("first-again").job.name == "first"


def test_one_whose_bytes_were_reclaimed_is_not_restored_though_they_are_in_the_trash(installation):
    gone = registry.delete(installation.dataset())
    reclaim(installation.settings, at=now() + timedelta(days=8))
    refused(installation, gone, StatusError, "the bytes of dataset 'chats' were reclaimed")


@pytest.mark.parametrize("ready", [True, False])
def test_one_whose_bytes_are_missing_is_not_restored(installation, ready):
    gone = registry.delete(installation.dataset(ready=ready))
    remove_tree(installation.root.dataset(gone.artifact_id))
    remove_tree(installation.root.assembling(gone.artifact_id))
    refused(installation, gone, InvalidError, gone.artifact_id)


def test_one_whose_bytes_are_others_is_not_restored(installation):
    gone = registry.delete(installation.dataset())
    other = installation.dataset("other", rows='{"messages": [{"role": "assistant", "content": "x"}]}\n')
    remove_tree(installation.root.dataset(gone.artifact_id))
    installation.root.dataset(other.artifact_id).rename(installation.root.dataset(gone.artifact_id))
    refused(installation, gone, InvalidError, "its manifest's digest is")


def test_a_checkpoint_is_restored_with_its_lineage(installation):
    job = installation.completed()
    checkpoint = checkpoints.delete(queries.find_checkpoint("first"))
    assert checkpoints.restore(checkpoint).artifact.status == "ready"
    assert queries.find_checkpoint("first").job_id == job.id
    assert checkpoints.restore(checkpoint).artifact.status == "ready"
    checkpoints.delete(checkpoint)
    remove_tree(installation.root.checkpoint(checkpoint.artifact_id))
    refused(installation, checkpoint, InvalidError, "MANIFEST")


def test_the_commands_restore_and_refuse(installation):
    installation.completed()
    for kind, name in (("dataset", "chats"), ("checkpoint", "first")):
        installation.run(kind, "delete", name, "--yes", check=0)
        assert installation.json(kind, "restore", name)["status"] == "ready"
        assert installation.json(kind, "show", name)["deleted_at"] is None
    installation.run("dataset", "restore", "nothing", check=3)
    installation.run("dataset", "delete", "chats", "--yes", check=0)
    installation.dataset(ready=False)
    gone = installation.json("dataset", "list", "--status", "deleted")[0]
    done = installation.run("dataset", "restore", gone["id"], check=4)
    assert "is taken by" in done.stderr and f"tfslurm dataset restore {gone['id']} --as NAME" in done.stderr


def test_the_registry_lists_both_kinds_by_kind_and_status_and_says_what_was_reclaimed(installation):
    installation.completed()
    installation.dataset("draft", ready=False)
    registry.delete(installation.dataset("gone"))
    reclaim(installation.settings, at=now() + timedelta(days=8))

    def listed(*options):
        return [(row["kind"], row["name"]) for row in installation.json("artifact", "list", *options)]

    assert sorted(listed()) == [("checkpoint", "first"), ("dataset", "chats"), ("dataset", "draft")]
    assert listed("--kind", "checkpoint") == [("checkpoint", "first")]
    assert sorted(listed("--kind", "dataset", "--status", "ready")) == [("dataset", "chats")]
    assert listed("--status", "assembling") == [("dataset", "draft")]
    (gone,) = installation.json("artifact", "list", "--status", "deleted")
    assert gone["name"] == "gone" and gone["reclaimed_at"] > gone["deleted_at"]
    assert gone == installation.json("artifact", "show", gone["id"])
    for row in installation.json("artifact", "list"):
        assert row["producer"] and row["location"]
