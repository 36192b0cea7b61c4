"""A site of its own for the tests of the whole chain: real Slurm, real DeepSpeed, real vLLM, a real small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

faults_wanted = pytest.mark.skipif(
    not os.environ.get("TFSLURM_TEST_FAULTS"),
    reason="takes five minutes of killed daemons and needs a quiet machine: set TFSLURM_TEST_FAULTS=1",
)

MODEL = "smollm2-135m-instruct"

TOP = Path(__file__).parents[2]

INSTANCES = """
instances:
  copy: {purposes: [import], partition: cpu, memory: 1G, time: 10}
  one-node: {purposes: [training], processes_per_node: 2, memory: 6G, time: 30}
  two-nodes: {purposes: [training], nodes: 2, memory: 4G, time: 30}
  tight: {purposes: [training], memory: 300M, time: 30}
  nowhere: {purposes: [training], partition: moon, time: 30}
  reserved: {purposes: [serving], reservation: serving, cpus_per_process: 2, memory: 12G, time: 60}
"""


@dataclass(frozen=True)
class Site:
    """An installation; calling it runs the command line, as a user would."""

    config: Path
    root: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tfslurm", "--config", str(self.config), *arguments]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The command line as a process that goes on by itself."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(self.command(*arguments), text=True, env=os.environ | environment, **pipes)

    def __call__(
        self, *arguments: str, expect: int = 0, timeout: float = 600, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        environ = os.environ | environment
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=timeout, env=environ)
        assert done.returncode == expect, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self(*arguments, "--json", **options).stdout)


def python_of(environment: str) -> str:
    python = os.environ.get(f"TFSLURM_TEST_{environment.upper()}_PYTHON")
    if not python:
        pytest.skip(
            f"no {environment} environment: TFSLURM_TEST_{environment.upper()}_PYTHON is not set (scripts/test)"
        )
    return python


def real_model() -> str:
    model = os.environ.get("TFSLURM_TEST_MODEL")
    if not model:
        pytest.skip("no staged model: TFSLURM_TEST_MODEL is not set (scripts/test)")
    return model


def make_site(folder: Path, **more: Any) -> Site:
    """Initialised, with `more` settings of site.yaml; no base model and no dataset is there yet."""
    config = folder / "site.yaml"
    environments = more.get("environments") or {
        "core": sys.executable, "train": python_of("train"), "serve": python_of("serve")
    }  # fmt: skip
    settings = {
        "root": str(folder / "root"),
        "environments": environments,
        "slurm": {"poll_floor": 1},
        "training": {"instance": "one-node"},
        "serving": {"instance": "reserved", "max_context": 512},
        "imports": {"instance": "copy"},
    }
    config.write_text(json.dumps(settings | more))
    config.with_name("instances.yaml").write_text(INSTANCES)
    site = Site(config, folder / "root")
    site("init")
    return site


def add_dataset(site: Site, name: str, rows: str) -> None:
    site("dataset", "create", name, "--format", "conversational")
    folder = Path(site("dataset", "path", name).stdout.strip())
    (folder / "rows.jsonl").write_text(rows)
    site("dataset", "seal", name)


def conversations(count: int = 12) -> str:
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"What is item {i}?"},
                {"role": "assistant", "content": f"Item {i} is a small blue box with the number {i * 7}."},
            ]
        }
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def cluster() -> None:
    """The dev cluster that scripts/test brought up."""
    if not shutil.which("sinfo"):
        pytest.skip("Slurm is not installed: see scripts/devcluster install")
    if "TFSLURM_DEVCLUSTER" not in os.environ:
        pytest.skip('no dev cluster is up: run scripts/test, or eval "$(scripts/devcluster up)"')


@pytest.fixture(scope="module")
def site(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    model = real_model()
    site = make_site(tmp_path_factory.mktemp("site"))
    site("model", "add", MODEL, "--path", model)
    add_dataset(site, "chats", conversations())
    return site


def devcluster(*words: str) -> None:
    """`scripts/devcluster WORDS`, on the cluster of these tests."""
    done = subprocess.run([TOP / "scripts" / "devcluster", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def slurm(*command: str) -> str:
    """What one of Slurm's own commands says."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def wait_until(met: Callable[[], Any], what: str, timeout: float = 120) -> Any:
    """What `met` returns, once that is true."""
    deadline = time.monotonic() + timeout
    while not (value := met()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.2)
    return value


def sacct(job_id: str, fields: str, *, ended: bool = False) -> list[str]:
    """The fields of the allocation of a job; waits until slurmdbd knows it and, with `ended`, its end."""
    command = ["sacct", "-X", "--noheader", "--parsable2", f"--format=State,{fields}", f"--jobs={job_id}"]
    deadline = time.monotonic() + 60
    while True:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        state, *values = said.split("|")
        if said and not (ended and state in ("PENDING", "RUNNING", "COMPLETING")):
            return [state.split()[0], *values]
        assert time.monotonic() < deadline, f"sacct says {said!r} of job {job_id}"
        time.sleep(0.5)


def trainers(folder: Path) -> list[int]:
    """The process ids of the trainers of the job in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tfslurm.training.trainer" in command and str(folder).encode() in command and b"-m" == command[1]:
            found.append(int(process.name))
    return found
