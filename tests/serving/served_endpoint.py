"""An endpoint's folder, and the supervisor as the process that the batch script starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfslurm.artifacts import manifest
from tfslurm.artifacts.references import BaseModelRef, CheckpointRef
from tfslurm.files import read_json
from tfslurm.paths import EndpointPaths
from tfslurm.serving.config import ServingConfig
from tfslurm.serving.engine import group

REPOSITORY = Path(__file__).parents[2]
KEY = "tfs-0123456789abcdef"


@dataclass
class Endpoint:
    """An endpoint's folder with its rendered configuration; `start` runs its supervisor."""

    paths: EndpointPaths
    pace: dict[str, Any]
    python: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    groups: set[int] = field(default_factory=set)

    def write(self, config: ServingConfig) -> None:
        self.paths.logs.mkdir(parents=True)
        self.paths.config.write_bytes(config.encode())
        self.paths.key.write_text(KEY + "\n")
        self.paths.key.chmod(0o600)

    def start(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "TFSLURM_SERVING_PACE": json.dumps(self.pace),
            **self.variables,
        }
        with open(self.paths.logs / "supervisor.log", "ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "tfslurm.serving.supervisor", str(self.paths.folder)],
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def state(self) -> dict[str, Any]:
        state = read_json(self.paths.state) or {}
        if state.get("engine_pid"):
            self.groups.add(state["engine_pid"])
        return state

    def wait_for(self, met: Callable[[dict[str, Any]], Any], timeout: float = 10.0) -> dict[str, Any]:
        """The first state that `met` accepts."""
        deadline = time.monotonic() + timeout
        while not met(state := self.state):
            assert state.get("status") != "error", state["reason"]
            assert time.monotonic() < deadline, f"{state}\n{(self.paths.logs / 'supervisor.log').read_text()}"
            time.sleep(0.02)
        return state

    def wait_until(self, status: str, timeout: float = 10.0) -> dict[str, Any]:
        return self.wait_for(lambda state: state.get("status") == status, timeout)

    def exit_code(self, timeout: float = 10.0) -> int:
        assert self.process
        return self.process.wait(timeout)

    def left(self) -> list[int]:
        """Processes of any engine that was seen."""
        return [pid for pgid in self.groups for pid in group(pgid)]

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


def make_config(folder: Path, checkpoint: Path, model: Path, *, rank: int = 8) -> ServingConfig:
    listed = manifest.build(checkpoint)
    manifest.write(listed, checkpoint)
    return ServingConfig(
        endpoint_id="e1",
        name="helpdesk",
        checkpoint=CheckpointRef(id="c1", name="first", path=str(checkpoint), digest=listed.digest, lora_rank=rank),
        base_model=BaseModelRef(name="smollm2", revision="r1", digest="", path=str(model)),
        max_context=512,
        threads=2,
        cache=str(folder / "cache"),
    )
