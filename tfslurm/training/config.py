"""The rendered configuration of a job: the one place where its hyperparameters stand."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.settings import MlflowSite, Trainer, TrainingSite, WandbSite


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


class Trackers(msgspec.Struct, frozen=True, kw_only=True):
    """Where metrics go besides the job's folder: the names of those that are used, and what each is told."""

    use: tuple[str, ...] = ()
    wandb: WandbSite = WandbSite()
    mlflow: MlflowSite = MlflowSite()

    @classmethod
    def of(cls, site: TrainingSite) -> Trackers:
        return cls(use=site.trackers, wandb=site.wandb, mlflow=site.mlflow)


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the trainer reads; written once, read-only, when the job is created."""

    version: int = 1
    job_id: str
    name: str
    base_model: BaseModelRef
    dataset: DatasetRef
    validation_dataset: DatasetRef | None = None
    """What the loss is measured on, and the best step chosen by; where there is none, the trainer's
    `validation_split` may take some rows of the dataset for it."""
    hyperparameters: Hyperparameters
    seed: int = 0
    processes: Processes = Processes()
    trainer: Trainer = Trainer()
    trackers: Trackers = Trackers()
    tokens: str
    """The folder in which tokenized datasets are cached."""

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def read(cls, path: Path) -> TrainingConfig:
        """Raises msgspec.ValidationError where the file is not one of ours."""
        return msgspec.json.decode(path.read_bytes(), type=cls)
