"""--validation-dataset, of job create and job sweep."""

from __future__ import annotations

import json

import pytest

from tfslurm.catalog.models import Job

WORDS = ("--model", "tiny", "--dataset", "chats", "--validation-dataset", "held")


@pytest.fixture
def site(installation, program):
    """Two datasets, a model, and a trainer that ends at once."""
    installation.model()
    installation.dataset()
    installation.dataset("held")
    python = str(program("python", "exit 3"))
    installation.configure(
        environments={"train": python, "core": "/bin/true"},
        training={"instance": "local", "trackers": ["mlflow"], "mlflow": {"experiment": "ours"}},
    )
    return installation


def test_a_job_s_configuration_names_what_it_is_validated_on_and_where_its_metrics_go(site, cli):
    training = cli("job", "create", *WORDS, "--dry-run", "--json").json()["training"]
    assert training["validation_dataset"]["name"] == "held"
    assert training["validation_dataset"]["path"].startswith(str(site.root.path))
    assert training["trackers"]["use"] == ["mlflow"] and training["trackers"]["mlflow"]["experiment"] == "ours"
    assert training["trainer"]["validations"] == 5
    created = cli("job", "create", *WORDS, "--name", "first", "--json").json()
    assert created["validation_dataset"] == training["validation_dataset"]["id"]
    shown = cli("lineage", "first", "--json").json()
    assert shown["validation_dataset"]["name"] == "held" and shown["dataset"]["name"] == "chats"
    assert "validation dataset held" in cli("lineage", "first").stdout


def test_every_cell_of_a_sweep_is_validated_on_the_same_rows(site, cli):
    cli("job", "sweep", *WORDS, "--grid", "lora-rank=8,16", "--name", "s", "--json").json()
    jobs = list(Job.select().order_by(Job.id))
    assert [job.validation_dataset.artifact.name for job in jobs] == ["held", "held"]
    for job in jobs:
        assert json.loads(site.root.job(job.id).config.read_bytes())["validation_dataset"]["name"] == "held"


def test_a_dataset_that_is_no_dataset_is_named(site, cli):
    done = cli("job", "create", "--model", "tiny", "--dataset", "chats", "--validation-dataset", "gone")
    assert done.code == 3 and "no dataset 'gone'" in done.stderr
    same = cli("job", "create", "--model", "tiny", "--dataset", "chats", "--validation-dataset", "chats")
    assert same.code == 5 and "trained on and validated on" in same.stderr
