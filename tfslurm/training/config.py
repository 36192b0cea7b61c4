"""The rendered configuration of a job: the one place where its hyperparameters stand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The six numbers that a user submits, reported back unchanged."""

    learning_rate: float
    epochs: int
    effective_batch_size: int
    max_seq_length: int
    lora_rank: int
    lora_alpha: int


class BaseModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """A staged base model: a Hugging Face folder."""

    name: str
    revision: str
    digest: str
    path: str


class DatasetRef(msgspec.Struct, frozen=True, kw_only=True):
    """A ready dataset: the folder of its canonical copy."""

    id: str
    name: str
    format: str
    digest: str
    path: str
    field_map: dict[str, str] = {}


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """How many trainer processes run, where, with how many CPU threads each."""

    nodes: int = 1
    per_node: int = 1
    threads: int = 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


class Trainer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the site chooses and the user does not see as a hyperparameter."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    micro_batch_tokens: int = 4096
    overlong: Literal["truncate", "drop"] = "truncate"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    lora_dropout: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_checkpointing: bool = False


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
