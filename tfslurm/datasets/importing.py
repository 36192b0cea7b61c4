"""Imports: a copy in the background that ends in a sealed dataset, or says why it did not."""

from __future__ import annotations

import json
import os

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Dataset, DatasetStatus, Submission
from tfslurm.datasets import registry
from tfslurm.datasets.files import expand
from tfslurm.datasets.sealing import cleared, lock, make_ready, staging_of
from tfslurm.errors import InvalidError
from tfslurm.files import read_json, write_atomic
from tfslurm.identity import current_user, new_id
from tfslurm.settings import Settings
from tfslurm.slurm import submissions
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.submissions import note_ended

ACTOR = "sync"


def start(
    settings: Settings, name: str, format: str, field_map: dict[str, str], source: str, instance: str | None = None
) -> Dataset:
    """Register a dataset and start copying `source` into it in the background.

    Raises InvalidError where the source cannot be found, or for the name, format, map or instance, StatusError
    where the name is taken: nothing is left then; SlurmRefused with the dataset in error; SlurmUnreachable with
    the dataset assembling: `sync` submits the import.
    """
    where = os.path.abspath(source)
    _check_source(where)
    kind = registry.checked(name, format, field_map)
    size = settings.instance(instance or settings.site.imports.instance, "import")
    dataset_id = new_id("dataset")
    paths = settings.root.import_(dataset_id)
    uuid, text = submissions.script_for(settings, "import", size, paths, "import", dataset_id)
    order = {
        "dataset_id": dataset_id,
        "source": where,
        "format": kind,
        "field_map": field_map,
        "staging": str(staging_of(settings.root, dataset_id)),
    }
    paths.logs.mkdir(parents=True)
    write_atomic(paths.config, json.dumps(order, indent=2) + "\n", mode=0o444)
    write_atomic(paths.script, text, mode=0o555)
    try:
        with write_transaction():
            dataset = registry.insert(dataset_id, name, kind, field_map, settings.root.dataset(dataset_id), where)
            submission = submissions.record(uuid, size, "import", dataset_id)
    except BaseException:
        remove_tree(paths.folder)
        raise
    submissions.hand_over(settings, submission, paths.script, lambda reason: _refuse(dataset, reason))
    return dataset


def _refuse(dataset: Dataset, reason: str) -> None:
    transition(dataset.artifact, DatasetStatus.ERROR, actor=current_user(), reason=reason, error=reason)


def _check_source(source: str) -> None:
    if "://" in source:
        raise InvalidError(f"cannot import from {source}", hint="Name a file, a folder or a glob.")
    expand(source)


def follow(settings: Settings, submission: Submission, seen: Observation) -> None:
    """Publish what was imported, or note why it was not; once more changes nothing."""
    dataset = queries.find_dataset(submission.object_id, deleted=True)
    outcome = read_json(settings.root.import_(submission.object_id).outcome)
    if dataset.artifact.status != DatasetStatus.ASSEMBLING:
        with write_transaction():
            note_ended(submission)
    elif outcome and outcome["result"] == "succeeded":
        _publish(settings, submission, dataset, outcome)
    elif outcome:
        _fail(submission, dataset, outcome["error"], outcome.get("report"))
    elif seen.fate.ended:
        _fail(submission, dataset, f"the import {seen.fate.value}: {seen.reason}", None)
    else:
        submission.slurm_state, submission.reason = seen.state, seen.reason
        submission.save(only=["slurm_state", "reason"])


def _publish(settings: Settings, submission: Submission, dataset: Dataset, outcome: dict) -> None:
    staging = staging_of(settings.root, dataset.artifact_id)
    final = settings.root.dataset(dataset.artifact_id)
    with lock(settings.root, dataset.artifact_id):
        try:
            if staging.exists():
                publish(staging, cleared(final))
            copied = manifest.read(final)
        except InvalidError as error:
            return _fail(submission, dataset, error.message, None)
        if copied.digest != outcome["digest"]:
            return _fail(submission, dataset, f"the copy's digest is {copied.digest}, not {outcome['digest']}", None)
        with write_transaction():
            make_ready(settings.root, dataset, copied, outcome["report"], ACTOR)
            note_ended(submission)


def _fail(submission: Submission, dataset: Dataset, error: str, report: dict | None) -> None:
    with write_transaction():
        transition(dataset.artifact, DatasetStatus.ERROR, actor=ACTOR, reason=error, error=error)
        if report:
            dataset.metadata = report
            dataset.save(only=["metadata"])
        note_ended(submission, error)
