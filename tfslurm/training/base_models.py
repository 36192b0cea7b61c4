"""The allow-list of base models: staged under the root, with revision and digest."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record
from tfslurm.catalog.models import BaseModel, Job, now
from tfslurm.errors import InvalidError, StatusError
from tfslurm.identity import check_name, current_user
from tfslurm.paths import STAGING
from tfslurm.settings import Settings
from tfslurm.training.programs import ask
from tfslurm.training.staging import StagedModel


def add(
    settings: Settings, name: str, *, path: Path | None = None, gguf: Path | None = None, hf: str | None = None
) -> BaseModel:
    """Stage a Hugging Face folder, a GGUF file as one, or a model of the Hub (`ID[@REVISION]`), and allow it.

    It is read by the training environment, since this one needs no torch. The revision is the commit of a model of
    the Hub, and of any other the start of its digest. Raises StatusError where the name is taken, InvalidError
    where the model cannot be read, and what `hub.fetch` raises; nothing is registered then.
    """
    check_name(name)
    _check_free(name)
    source, option = _source(path, gguf, hf)
    final, staging = settings.root.model(name), settings.root.model(STAGING + name)
    for leftover in (staging, final):  # of an earlier attempt that was killed before its row was written
        if leftover.exists():
            remove_tree(leftover)
    staged = ask(settings, "tfslurm.training.staging", option, str(staging), answer=StagedModel, online=hf is not None)
    if staged.revision:
        source = f"hf://{hf.partition('@')[0]}@{staged.revision}"
    content = manifest.build(staging)
    manifest.write(content, staging)
    publish(staging, final)
    with write_transaction():
        _check_free(name)
        return _insert(name, source, content, final, staged)


def _source(path: Path | None, gguf: Path | None, hf: str | None) -> tuple[str, str]:
    """What is recorded as the source, and the staging program's option for it."""
    if hf is not None:
        return hf, f"--hf={hf}"
    source = (path or gguf).expanduser().absolute()
    if not source.exists():
        raise InvalidError(f"{source}: no such file or folder")
    return str(source), f"{'--gguf' if gguf else '--path'}={source}"


def _check_free(name: str) -> None:
    if BaseModel.get_or_none(BaseModel.name == name):
        raise StatusError(f"the base model '{name}' is there already", hint="Remove it first, or choose another name.")


def _insert(name: str, source: str, content: manifest.Manifest, final: Path, staged: StagedModel) -> BaseModel:
    metadata = msgspec.to_builtins(staged)
    revision = metadata.pop("revision", content.digest.partition(":")[2][:12])
    model = BaseModel.create(
        name=name,
        revision=revision,
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
