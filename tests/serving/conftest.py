from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_endpoint import REPOSITORY, Endpoint, make_config

from tfslurm.paths import EndpointPaths
from tfslurm.serving.config import ServingConfig


@pytest.fixture
def config(tmp_path: Path) -> ServingConfig:
    """Of an endpoint `helpdesk` on a checkpoint that verifies; the adapter's bytes are no adapter."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    return make_config(tmp_path, checkpoint, tmp_path / "model")


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    """With a fake vLLM, steered by the files of `tmp_path / "engine"`, and a quick pace."""
    (tmp_path / "engine").mkdir()
    pace = {
        "poll": 0.02, "heartbeat": 0.2, "start_interval": 0.05, "start_timeout": 5.0, "probe_interval": 0.05,
        "probe_timeout": 0.3, "glance_timeout": 0.3, "restarts": 2, "first_restarts": 1, "backoff": 0.05,
        "drain": 1, "kill_after": 0.5,
    }  # fmt: skip
    fake = Path(__file__).parent / "fake"
    variables = {"PYTHONPATH": f"{fake}:{REPOSITORY}", "FAKE_ENGINE": str(tmp_path / "engine")}
    made = Endpoint(EndpointPaths(tmp_path / "endpoint"), pace, variables=variables)
    yield made
    made.end()


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., None]:
    """Steer the fake: `engine(mode="silent")`, `engine(start="broken")`."""

    def steer(**words: str) -> None:
        for name, word in words.items():
            (tmp_path / "engine" / f"{name}.new").write_text(word)
            (tmp_path / "engine" / f"{name}.new").rename(tmp_path / "engine" / name)

    return steer


@pytest.fixture
def starts(tmp_path: Path) -> Callable[[], list[list[int]]]:
    """`[pid, port]` of every start of the fake."""

    def read() -> list[list[int]]:
        text = (tmp_path / "engine" / "starts").read_text()
        return [[int(part) for part in line.split()] for line in text.splitlines()]

    return read
