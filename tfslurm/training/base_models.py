"""The allow-list of base models: staged under the root, with revision and digest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record
from tfslurm.catalog.models import BaseModel, Job, now
from tfslurm.errors import InvalidError, StatusError
from tfslurm.identity import check_name, current_user
from tfslurm.paths import STAGING
from tfslurm.settings import Settings


def add(settings: Settings, name: str, *, path: Path | None = None, gguf: Path | None = None) -> BaseModel:
    """Stage a Hugging Face folder, or a GGUF file as one, and put it on the allow-list.

    It is converted by the training environment, since this one needs no torch. Raises StatusError where the
    name is taken, InvalidError where the model cannot be read; nothing is registered then.
    """
    check_name(name)
    _check_free(name)
    source = (path or gguf).expanduser().absolute()
    if not source.exists():
        raise InvalidError(f"{source}: no such file or folder")
    final, staging = settings.root.model(name), settings.root.model(STAGING + name)
    for leftover in (staging, final):  # of an earlier attempt that was killed before its row was written
        if leftover.exists():
            remove_tree(leftover)
    metadata = _stage(settings, ["--gguf" if gguf else "--path", str(source)], staging)
    content = manifest.build(staging)
    manifest.write(content, staging)
    publish(staging, final)
    with write_transaction():
        _check_free(name)
        return _insert(name, str(source), content, final, metadata)


def _check_free(name: str) -> None:
    if BaseModel.get_or_none(BaseModel.name == name):
        raise StatusError(f"the base model '{name}' is there already", hint="Remove it first, or choose another name.")


def _stage(settings: Settings, source: list[str], staging: Path) -> dict:
    """Run the staging program; what it says of the model. Its progress goes to this process's stderr."""
    command = [settings.python("train"), "-m", "tfslurm.training.staging", *source, str(staging)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InvalidError(
            f"{source[1]} could not be staged as a base model",
            hint=f"The reason stands above. It ran in the training environment, {command[0]}.",
        )
    return json.loads(done.stdout.splitlines()[-1])


def _insert(name: str, source: str, content: manifest.Manifest, final: Path, metadata: dict) -> BaseModel:
    model = BaseModel.create(
        name=name,
        revision=content.digest.partition(":")[2][:12],
        digest=content.digest,
        location=str(final),
        source=source,
        metadata=metadata,
        owner=current_user(),
        created_at=now(),
    )
    record(model, "added", actor=current_user())
    return model


def remove(model: BaseModel) -> None:
    """Take a base model off the allow-list, and its files away.

    Raises StatusError naming a job that was trained on it: its lineage needs it.
    """
    with write_transaction():
        job = Job.get_or_none(Job.base_model == model)
        if job:
            raise StatusError(f"base model '{model.name}' is in the lineage of job '{job.name}'")
        record(model, "removed", actor=current_user())
        model.delete_instance()
    remove_tree(Path(model.location))
