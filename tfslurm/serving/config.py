"""The rendered configuration of an endpoint."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfslurm.artifacts.references import BaseModelRef, CheckpointRef


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the supervisor reads; written once, read-only, when the endpoint is created."""

    version: int = 1
    endpoint_id: str
    name: str
    """The model name that clients ask for."""
    checkpoint: CheckpointRef
    base_model: BaseModelRef
    max_context: int
    precision: str = "auto"
    quantization: str | None = None
    tensor_parallel: int = 1
    threads: int = 1
    """CPU threads of the engine, where there is no GPU."""
    bind: str = "127.0.0.1"
    port: int = 0
    """0 picks a free port at each start; an endpoint on the local launcher keeps one for life."""
    cache: str
    """A folder for compiled kernels, shared between endpoints."""
    start_timeout: float | None = None
    """Seconds until an engine that never became healthy is given up; None is the supervisor's own default."""
    engine_options: dict[str, str | int | float | bool] = {}
    """More options of vLLM's server, from the instance: `{"enforce-eager": true}`."""

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def read(cls, path: Path) -> ServingConfig:
        """Raises msgspec.ValidationError where the file is not one of ours."""
        return msgspec.json.decode(path.read_bytes(), type=cls)
