import os

import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.models import Event, Job, Submission
from tfslurm.datasets import registry
from tfslurm.errors import InvalidError, StatusError


def test_a_new_dataset_has_a_writable_folder_and_an_event(installation):
    made = registry.create(installation.settings, "chats", "conversational", {"content": "text"})
    row = queries.find_dataset("chats")
    assert row.artifact_id == made.artifact_id
    assert (row.artifact.status, row.format, row.field_map, row.source) == (
        "assembling", "conversational", {"content": "text"}, None
    )  # fmt: skip
    folder = installation.root.assembling(made.artifact_id)
    assert row.artifact.location == str(folder)
    assert os.access(folder, os.W_OK) and list(folder.iterdir()) == []
    assert [(event.change, event.to_status) for event in queries.events_of(made.artifact_id)] == [
        ("created", "assembling")
    ]


@pytest.mark.parametrize(
    ("name", "format", "field_map", "error"),
    [
        ("Bad Name", "text", {}, InvalidError),
        ("good", "csv", {}, InvalidError),
        ("good", "text", {"prompt": "q"}, InvalidError),
        ("good", "text", {"text": 'a"b'}, InvalidError),
        ("taken", "text", {}, StatusError),
    ],
)
def test_what_is_refused_leaves_neither_a_row_nor_a_folder(installation, name, format, field_map, error):
    registry.create(installation.settings, "taken", "text", {})
    before = installation.everything()
    with pytest.raises(error):
        registry.create(installation.settings, name, format, field_map)
    assert installation.everything() == before


def test_the_name_of_a_deleted_dataset_is_free_again(installation):
    first = installation.dataset()
    registry.delete(first)
    second = installation.dataset()
    assert second.artifact_id != first.artifact_id
    assert queries.find_dataset("chats").artifact_id == second.artifact_id


def test_deleting_hides_and_keeps_the_bytes_and_once_more_changes_nothing(installation):
    dataset = installation.dataset()
    tree = installation.tree()
    assert registry.delete(dataset).artifact.status == "deleted"
    count = Event.select().count()
    assert registry.delete(queries.find_dataset("chats", deleted=True)).artifact.status == "deleted"
    assert Event.select().count() == count
    assert installation.tree() == tree
    assert queries.find_dataset("chats", deleted=True).artifact.deleted_at


@pytest.mark.parametrize("status", ["pending", "running", "stopping"])
def test_a_dataset_with_a_living_consumer_stays_and_names_it(installation, status):
    job = installation.job("busy")
    Job.update(status=status).execute()
    before = installation.everything()
    with pytest.raises(StatusError, match=rf"'chats' is in use: job 'busy' \({status}\)"):
        registry.delete(queries.find_dataset("chats"))
    assert installation.everything() == before
    Job.update(status="error").where(Job.id == job.id).execute()
    registry.delete(queries.find_dataset("chats"))


def test_a_job_is_not_created_on_a_dataset_that_was_deleted_after_it_was_planned(installation):
    from tfslurm.training import jobs

    made = installation.plan("late")
    registry.delete(queries.find_dataset("chats"))
    before = installation.everything()
    with pytest.raises(Exception, match="no dataset"):
        jobs.create(installation.settings, made)
    assert installation.everything() == before
    assert Job.select().count() == Submission.select().count() == 0
