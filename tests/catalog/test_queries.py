import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Artifact, Job
from tfslurm.catalog.queries import Page, paged
from tfslurm.datasets import registry
from tfslurm.errors import NotFoundError, StatusError


@pytest.fixture
def three(installation):
    for name in ("alpha", "beta", "alphabet"):
        installation.dataset(name, ready=name == "beta")
    return installation


def listed(**page):
    return [row.artifact.name for row in paged(queries.datasets(), Artifact, Page(**page))]


def test_a_listing_has_the_newest_first(three):
    assert listed() == ["alphabet", "beta", "alpha"]


def test_a_listing_is_filtered_by_status_owner_and_glob(three):
    assert listed(status="ready") == ["beta"]
    assert listed(name="alpha*") == ["alphabet", "alpha"]
    assert listed(name="?e[st]a") == ["beta"]
    assert listed(name="ALPHA") == []
    assert listed(owner="nobody-else") == []


def test_pages_go_on_behind_the_last_one_seen(three):
    first = list(paged(queries.datasets(), Artifact, Page(limit=2)))
    assert [row.artifact.name for row in first] == ["alphabet", "beta"]
    assert listed(limit=2, after=first[-1].artifact_id) == ["alpha"]


def test_deleted_ones_are_shown_only_when_asked_for(three):
    registry.delete(queries.find_dataset("beta"))
    assert listed() == ["alphabet", "alpha"]
    assert listed(status="deleted") == ["beta"]
    with pytest.raises(NotFoundError, match="no dataset 'beta'"):
        queries.find_dataset("beta")
    assert queries.find_dataset("beta", deleted=True).artifact.status == "deleted"


def test_a_name_means_the_living_one_and_then_the_newest_deleted_one(three):
    old = queries.find_dataset("beta").artifact_id
    registry.delete(queries.find_dataset("beta"))
    new = three.dataset("beta").artifact_id
    assert queries.find_dataset("beta", deleted=True).artifact_id == new
    assert queries.find_dataset(old, deleted=True).artifact_id == old
    registry.delete(queries.find_dataset("beta"))
    assert queries.find_dataset("beta", deleted=True).artifact_id == new


def test_a_dataset_is_not_found_as_another_kind(three):
    for find in (queries.find_checkpoint, queries.find_job, queries.find_endpoint):
        with pytest.raises(NotFoundError, match="alpha"):
            find("alpha")


def test_an_unknown_model_names_the_known_ones(three):
    with pytest.raises(NotFoundError) as caught:
        queries.find_model("gpt")
    assert "tfslurm model add" in caught.value.hint
    three.model("tiny")
    with pytest.raises(NotFoundError) as caught:
        queries.find_model("gpt")
    assert caught.value.hint == "There are: tiny."


def test_a_jobs_name_is_taken_for_ever_and_a_datasets_until_it_is_deleted(installation):
    job = installation.completed("first")
    with write_transaction(), pytest.raises(StatusError, match=f"the name 'first' is taken by job {job.id}"):
        queries.check_name_free(Job, "job", "first")
    registry.delete(queries.find_dataset("chats"))
    with write_transaction():
        queries.check_name_free(Artifact, "dataset", "chats")
        queries.check_name_free(Artifact, "dataset", "first")  # a checkpoint's name is not a dataset's


def test_the_newest_submission_of_each_object_is_found(installation):
    job = installation.job()
    found = queries.submissions_of([job.id, "job-unknown"])
    assert list(found) == [job.id]
