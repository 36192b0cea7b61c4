"""The rendered configuration of a job: the one place where its hyperparameters stand."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.settings import Trainer


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The six numbers that a user submits, reported back unchanged."""

    learning_rate: float
    epochs: int
    effective_batch_size: int
    max_seq_length: int
    lora_rank: int
    lora_alpha: int


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """How many trainer processes run, where, with how many CPU threads each."""

    nodes: int = 1
    per_node: int = 1
    threads: int = 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the trainer reads; written once, read-only, when the job is created."""

    version: int = 1
    job_id: str
    name: str
    base_model: BaseModelRef
    dataset: DatasetRef
    hyperparameters: Hyperparameters
    seed: int = 0
    processes: Processes = Processes()
    trainer: Trainer = Trainer()
    tokens: str
    """The folder in which tokenized datasets are cached."""

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def read(cls, path: Path) -> TrainingConfig:
        """Raises msgspec.ValidationError where the file is not one of ours."""
        return msgspec.json.decode(path.read_bytes(), type=cls)
