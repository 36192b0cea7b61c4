from enum import StrEnum

import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import TRANSITIONS, record, transition
from tfslurm.catalog.models import (
    Artifact,
    CheckpointStatus,
    DatasetStatus,
    Endpoint,
    EndpointStatus,
    Event,
    Job,
    JobStatus,
)
from tfslurm.errors import StatusError

STATUSES: dict[str, type[StrEnum]] = {
    "dataset": DatasetStatus,
    "job": JobStatus,
    "checkpoint": CheckpointStatus,
    "endpoint": EndpointStatus,
}


@pytest.fixture
def rows(installation):
    """One row of every kind, by its kind."""
    job = installation.completed()
    endpoint = installation.endpoint()
    checkpoint = queries.find_checkpoint("first")
    return {
        "dataset": Artifact.get_by_id(job.dataset_id),
        "job": job,
        "checkpoint": checkpoint.artifact,
        "endpoint": endpoint,
    }


def put(row, status):
    """Set a status behind the table's back; the row as it is then."""
    model = type(row)
    model.update(status=status.value).where(model.id == row.id).execute()
    return model.get_by_id(row.id)


def events(row):
    return list(Event.select().where(Event.object_id == row.id).order_by(Event.id))


@pytest.mark.parametrize("kind", STATUSES)
def test_every_status_has_its_line_in_the_table(kind):
    assert set(TRANSITIONS[kind]) == set(STATUSES[kind])


@pytest.mark.parametrize("kind", STATUSES)
def test_just_the_transitions_of_the_table_are_made(rows, kind):
    for before in STATUSES[kind]:
        for after in STATUSES[kind]:
            row = put(rows[kind], before)
            count = len(events(row))
            if after in TRANSITIONS[kind][before]:
                with write_transaction():
                    transition(row, after, actor="somebody", reason="why")
                assert type(row).get_by_id(row.id).status == row.status == after
                last = events(row)[-1]
                assert (last.kind, last.change, last.from_status, last.to_status) == (kind, after, before, after)
                assert (last.actor, last.reason) == ("somebody", "why")
                assert len(events(row)) == count + 1
            else:
                with pytest.raises(StatusError, match=f"is {before}: it cannot become {after}"), write_transaction():
                    transition(row, after, actor="somebody")
                assert type(row).get_by_id(row.id).status == row.status == before
                assert len(events(row)) == count


def test_what_somebody_else_changed_meanwhile_is_not_overwritten(rows):
    mine, theirs = Job.get_by_id(rows["job"].id), put(rows["job"], JobStatus.RUNNING)
    mine.status = "running"
    with write_transaction():
        transition(theirs, JobStatus.COMPLETED, actor="they")
    count = len(events(mine))
    with pytest.raises(StatusError, match="is no longer running: somebody else changed it"), write_transaction():
        transition(mine, JobStatus.ERROR, actor="me", error="mine")
    found = Job.get_by_id(mine.id)
    assert (found.status, found.error, mine.status) == ("completed", None, "running")
    assert len(events(mine)) == count


def test_a_transaction_that_fails_leaves_neither_status_nor_event(rows):
    row = put(rows["endpoint"], EndpointStatus.HEALTHY)
    count = len(events(row))
    with pytest.raises(RuntimeError), write_transaction():
        transition(row, EndpointStatus.UNHEALTHY, actor="me", url="http://elsewhere")
        raise RuntimeError
    found = Endpoint.get_by_id(row.id)
    assert (found.status, found.url) == ("healthy", rows["endpoint"].url)
    assert len(events(row)) == count


def test_other_columns_change_with_the_status(rows):
    row = put(rows["endpoint"], EndpointStatus.STARTING)
    with write_transaction():
        transition(row, EndpointStatus.HEALTHY, actor="me", url="http://here", attempt=3)
    found = Endpoint.get_by_id(row.id)
    assert (found.url, found.attempt) == (row.url, row.attempt) == ("http://here", 3)


def test_a_transition_needs_a_write_transaction(rows):
    with pytest.raises(AssertionError, match="outside write_transaction"):
        transition(rows["dataset"], DatasetStatus.DELETED, actor="me")


def test_an_event_without_a_status_says_what_happened(rows):
    with write_transaction():
        record(rows["job"], "renamed", actor="me", reason="why not")
    last = events(rows["job"])[-1]
    assert (last.change, last.from_status, last.to_status) == ("renamed", None, None)
