"""What a rendered configuration says of what it uses: enough to find it, and to see that it is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tfslurm.catalog.models import BaseModel, Checkpoint, Dataset


class BaseModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """A staged base model: a Hugging Face folder."""

    name: str
    revision: str
    digest: str
    path: str

    @classmethod
    def of(cls, model: BaseModel) -> BaseModelRef:
        return cls(name=model.name, revision=model.revision, digest=model.digest, path=model.location)


class DatasetRef(msgspec.Struct, frozen=True, kw_only=True):
    """A ready dataset: the folder of its canonical copy."""

    id: str
    name: str
    format: str
    digest: str
    path: str
    field_map: dict[str, str] = {}

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetRef:
        registered = dataset.artifact
        return cls(
            id=registered.id,
            name=registered.name,
            format=dataset.format,
            digest=registered.digest,
            path=registered.location,
            field_map=dataset.field_map,
        )


class CheckpointRef(msgspec.Struct, frozen=True, kw_only=True):
    """A published checkpoint: the folder of a PEFT adapter."""

    id: str
    name: str
    path: str
    digest: str
    lora_rank: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CheckpointRef:
        registered = checkpoint.artifact
        return cls(
            id=registered.id,
            name=registered.name,
            path=registered.location,
            digest=registered.digest,
            lora_rank=checkpoint.metadata["lora_rank"],
        )
