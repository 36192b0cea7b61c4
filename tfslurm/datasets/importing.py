"""Imports: a copy in the background that ends in a sealed dataset, or says why it did not."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any, BinaryIO

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Artifact, Dataset, DatasetStatus, Submission
from tfslurm.datasets import registry
from tfslurm.datasets.files import expand
from tfslurm.datasets.sealing import cleared, lock, make_ready, staging_of
from tfslurm.datasets.sources import STDIN, Source
from tfslurm.datasets.spooling import Progress, spooled
from tfslurm.errors import InvalidError, NotFoundError
from tfslurm.faults import fault_point
from tfslurm.files import read_json, write_atomic
from tfslurm.identity import current_user, new_id
from tfslurm.paths import ImportPaths
from tfslurm.settings import Settings
from tfslurm.slurm import submissions
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import note_ended

ACTOR = "sync"

ATTEMPTS = 3
"""How often an import is submitted that is killed every time."""


def start(
    settings: Settings,
    name: str,
    format: str,
    field_map: dict[str, str],
    source: str,
    instance: str | None = None,
    *,
    stream: BinaryIO | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Register a dataset and start copying `source` into it in the background.

    `source` is a path, a URL, or - for `stream`, which is read to its end first; `progress` is told
    of that. What is secret in a URL reaches one file alone, which its owner may read.

    Raises InvalidError where the source cannot be found, or for the name, format, map or instance, StatusError
    where the name is taken: nothing is left then; SlurmRefused with the dataset in error; SlurmUnreachable with
    the dataset assembling: `sync` submits the import.
    """
    origin = _checked(settings, source)
    kind = registry.checked(name, format, field_map)
    size = settings.instance(instance or settings.site.imports.instance, "import")
    queries.check_name_free(Artifact, "dataset", name)  # before hours of spooling; the insert looks again
    dataset_id = new_id("dataset")
    paths = settings.root.import_(dataset_id)
    uuid, text = submissions.script_for(settings, "import", size, paths, "import", dataset_id)
    order = {
        "dataset_id": dataset_id,
        "source": origin.shown,
        "format": kind,
        "field_map": field_map,
        "staging": str(staging_of(settings.root, dataset_id)),
        "instance": size.name,
    }
    with spooled(settings.root, paths, stream, progress) if stream else nullcontext():
        try:
            _write(paths, origin, order, text)
            fault_point("import-written")
            with write_transaction():
                final = settings.root.dataset(dataset_id)
                dataset = registry.insert(dataset_id, name, kind, field_map, final, _recorded(origin))
                submission = submissions.record(uuid, size, "import", dataset_id)
        except BaseException:
            remove_tree(paths.folder)
            raise
    fault_point("import-recorded")
    submissions.hand_over(settings, submission, paths.script, lambda reason: _refuse(settings, dataset, reason))
    return dataset


def _checked(settings: Settings, source: str) -> Source:
    """Raises InvalidError where nothing is there, as far as can be told without asking a server."""
    origin = Source.parse(source)
    if origin.scheme == "":
        expand(origin.given)
    if settings.python("core") == sys.executable:
        origin.check_package()
    return origin


def _recorded(origin: Source) -> str:
    return "standard input" if origin.scheme == STDIN else origin.shown


def _write(paths: ImportPaths, origin: Source, order: dict[str, Any], script: str) -> None:
    paths.logs.mkdir(parents=True)
    if origin.secret:
        write_atomic(paths.source, origin.given, mode=0o600)
    write_atomic(paths.config, json.dumps(order, indent=2) + "\n", mode=0o444)
    write_atomic(paths.script, script, mode=0o555)


def _refuse(settings: Settings, dataset: Dataset, reason: str) -> None:
    transition(dataset.artifact, DatasetStatus.ERROR, actor=current_user(), reason=reason, error=reason)
    _clean_up(settings, dataset)


def _clean_up(settings: Settings, dataset: Dataset) -> None:
    """Remove the spool and the source's secret, as the importer does at its end where it comes to one."""
    paths = settings.root.import_(dataset.artifact_id)
    remove_tree(paths.spool)
    paths.source.unlink(missing_ok=True)


def follow(settings: Settings, dataset: Dataset, submission: Submission, seen: Observation) -> bool:
    """Publish what was imported, or note why it was not; once more changes nothing. Whether it goes on."""
    outcome = read_json(settings.root.import_(submission.object_id).outcome)
    if dataset.artifact.status != DatasetStatus.ASSEMBLING:
        _clean_up(settings, dataset)
        with write_transaction():
            note_ended(submission)
    elif outcome and outcome["result"] == "succeeded":
        _publish(settings, submission, dataset, outcome)
    elif outcome:
        _fail(settings, submission, dataset, outcome["error"], outcome.get("report"))
    elif seen.fate.ended or seen.fate is Fate.PREEMPTED:  # the script says --no-requeue: nobody starts it again
        _go_on(settings, submission, dataset, seen)
    else:
        return True
    return False


def _go_on(settings: Settings, submission: Submission, dataset: Dataset, seen: Observation) -> None:
    """An import that was killed goes on where it was, under a new submission, up to ATTEMPTS in all."""
    reason = f"the import {seen.fate.value}: {seen.reason}"
    tried = Submission.select().where(Submission.object_id == dataset.artifact_id).count()
    if not _was_killed(submission, seen):
        return _fail(settings, submission, dataset, reason, None)
    if tried >= ATTEMPTS:
        return _fail(settings, submission, dataset, f"{reason} (attempt {tried} of {ATTEMPTS})", None)
    paths = settings.root.import_(dataset.artifact_id)
    try:
        size = settings.instance((read_json(paths.config) or {}).get("instance", "auto"), "import")
        uuid, text = submissions.script_for(settings, "import", size, paths, "import", dataset.artifact_id)
    except (InvalidError, NotFoundError) as error:
        return _fail(settings, submission, dataset, f"{reason}; it cannot go on: {error.message}", None)
    write_atomic(paths.script, text, mode=0o555)
    with write_transaction():
        note_ended(submission, reason)
        again = submissions.record(uuid, size, "import", dataset.artifact_id)
        record(dataset.artifact, "resumed", actor=ACTOR, reason=f"attempt {tried + 1} of {ATTEMPTS}: {reason}")
    fault_point("import-resubmitted")
    submissions.hand_over(settings, again, paths.script, lambda reason: _refuse(settings, dataset, reason))


def _was_killed(submission: Submission, seen: Observation) -> bool:
    """Whether it ended from outside, and not by its own fault: then the next attempt may come further.

    Exit code 137 is a kill -9 of the importer alone; 143, a SIGTERM, comes from a shutdown where there
    is no scancel.
    """
    if seen.fate in (Fate.LOST, Fate.INFRASTRUCTURE, Fate.TIMEOUT, Fate.PREEMPTED):
        return True
    codes = (137, 143) if submission.launcher == "local" else (137,)
    return seen.fate is Fate.FAILED and seen.exit_code in codes


def _publish(settings: Settings, submission: Submission, dataset: Dataset, outcome: dict) -> None:
    staging = staging_of(settings.root, dataset.artifact_id)
    final = settings.root.dataset(dataset.artifact_id)
    with lock(settings.root, dataset.artifact_id):
        try:
            if staging.exists():
                publish(staging, cleared(final))
            copied = manifest.read(final)
        except InvalidError as error:
            return _fail(settings, submission, dataset, error.message, None)
        if copied.digest != outcome["digest"]:
            error = f"the copy's digest is {copied.digest}, not {outcome['digest']}"
            return _fail(settings, submission, dataset, error, None)
        fault_point("import-published")
        _clean_up(settings, dataset)
        with write_transaction():
            make_ready(settings.root, dataset, copied, outcome["report"], ACTOR)
            note_ended(submission)
            fault_point("import-marked")
        fault_point("import-ready")


def _fail(settings: Settings, submission: Submission, dataset: Dataset, error: str, report: dict | None) -> None:
    _clean_up(settings, dataset)
    with write_transaction():
        transition(dataset.artifact, DatasetStatus.ERROR, actor=ACTOR, reason=error, error=error)
        if report:
            dataset.metadata = report
            dataset.save(only=["metadata"])
        note_ended(submission, error)
