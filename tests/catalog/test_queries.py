import msgspec
import pytest

from tfslurm.catalog import lineage, queries, views
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Artifact, Job
from tfslurm.catalog.needs import needed_by
from tfslurm.catalog.queries import Page, paged
from tfslurm.datasets import registry
from tfslurm.errors import InvalidError, NotFoundError, StatusError
from tfslurm.training import jobs


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


def test_a_validation_dataset_is_kept_by_its_job_as_the_training_one_is(installation):
    held = installation.dataset("held")
    job = installation.job("busy", validation_dataset="held")
    for ref in ("held", "chats"):
        with pytest.raises(StatusError, match="is in use: job 'busy'"):
            registry.delete(queries.find_dataset(ref))
    assert needed_by(held.artifact) == ["job 'busy' (pending)"]
    assert [row.id for row in lineage.trace("held").consumers] == [job.id]
    chain = lineage.trace("busy")
    assert (chain.dataset.artifact.name, chain.validation_dataset.artifact.name) == ("chats", "held")
    installation.trained(job)
    installation.sync()
    registry.delete(queries.find_dataset("held"))
    assert lineage.trace("busy").validation_dataset.artifact.status == "deleted"


def test_the_views_of_a_job_and_its_checkpoint_tell_how_it_was_validated(installation):
    installation.dataset("held")
    job = installation.job("checked", validation_dataset="held")
    outcome = installation.trained(job)
    losses = {"validation_loss": 1.25, "best_step": 2, "final_validation_loss": 1.5}
    installation.write_outcome(job, msgspec.structs.replace(outcome, **losses))
    installation.sync()
    view = views.job_view(queries.find_job("checked"), installation.root, None)
    assert losses.items() <= view.items()
    metadata = views.checkpoint_view(queries.find_checkpoint(view["checkpoint"]))["metadata"]
    assert losses.items() <= metadata.items() and metadata["validation_dataset"] == view["validation_dataset"]
    plain = views.job_view(installation.completed("plain"), installation.root, None)
    assert plain["validation_loss"] is plain["validation_dataset"] is None


def test_a_job_is_not_validated_on_what_it_is_trained_on_nor_on_what_is_not_ready(installation):
    with pytest.raises(InvalidError, match="'chats' is to be trained on and validated on"):
        installation.plan(validation_dataset="chats")
    installation.dataset("open", ready=False)
    with pytest.raises(StatusError, match="'open' is assembling, not ready"):
        installation.plan(validation_dataset="open")
    made = installation.plan(validation_dataset=installation.dataset("held").artifact_id)
    registry.delete(queries.find_dataset("held"))
    before = installation.everything()
    with pytest.raises(NotFoundError, match="no dataset"):
        jobs.create(installation.settings, made)
    assert installation.everything() == before
