"""An installation of one's own, the command line on it, and scripts that stand in for the nodes' Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tfslurm import settings as configuration
from tfslurm.artifacts.manifest import sha256_file
from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog import db, queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import TABLES, BaseModel, Dataset, Endpoint, Job, Submission, database, now
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import seal
from tfslurm.files import write_atomic
from tfslurm.installation import install
from tfslurm.settings import Settings
from tfslurm.sync import Summary, sync
from tfslurm.training import jobs
from tfslurm.training.outcome import AdapterSummary, FileEntry, Outcome, Succeeded, write_outcome

REPOSITORY = Path(__file__).parents[1]

CONVERSATION = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'

MODEL = "tiny"


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell's background processes ignore SIGINT, and so would every command that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Installation:
    """A storage root with its catalog and its own configuration; `here` is the local instance."""

    folder: Path
    settings: Settings

    @property
    def root(self) -> Any:
        return self.settings.root

    @property
    def config(self) -> Path:
        return self.folder / "site.yaml"

    def run(
        self, *words: str, check: int | None = None, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        """`tfslurm WORDS` as a process of its own; with `check`, its exit code must be that."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TFSLURM_", "SLURM_", "_TFSLURM"))}
        environ |= {"TFSLURM_CONFIG": str(self.config), "HOME": str(self.folder), "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-m", "tfslurm", *words], env=environ | environment, input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if check is not None:
            assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *words: str, check: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", check=check).stdout)

    def configure(self, **site: Any) -> Settings:
        """Lay `site` over the site's file; the new settings."""
        old = yaml.safe_load(self.config.read_text()) or {}
        self.config.write_text(yaml.safe_dump(old | site))
        self.settings = configuration.load(self.config, environ={})
        return self.settings

    def catalog(self) -> dict[str, list[tuple]]:
        """Every row of every table but the leases, to compare before and after."""
        tables = [table for table in TABLES if table.__name__ != "Lease"]
        return {table.__name__: sorted(table.select().tuples(), key=str) for table in tables}

    def tree(self) -> dict[str, tuple]:
        """Every path under the root but the database's own, with its mode and content."""
        found = {}
        for path in sorted(self.root.path.rglob("*")):
            if not path.name.startswith(("catalog.db", "tfslurm.log")):
                content = path.read_bytes() if path.is_file() else None
                found[str(path.relative_to(self.root.path))] = (path.stat().st_mode, content)
        return found

    def everything(self) -> tuple[dict, dict]:
        return self.catalog(), self.tree()

    def sync(self) -> Summary:
        return sync(self.settings)

    def dataset(self, name: str = "chats", *, ready: bool = True, rows: str = CONVERSATION) -> Dataset:
        made = registry.create(self.settings, name, "conversational", {})
        (self.root.assembling(made.artifact_id) / "a.jsonl").write_text(rows)
        return seal(self.settings, made) if ready else made

    def model(self, name: str = MODEL) -> BaseModel:
        """A staged base model whose bytes are no model."""
        folder = self.root.model(name)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with write_transaction():
            return BaseModel.create(
                name=name, revision="r1", digest="sha256:1", location=str(folder), source="/models/tiny",
                metadata={"max_position_embeddings": 2048}, owner="somebody", created_at=now(),
            )  # fmt: skip

    def plan(self, name: str | None = "first", **request: Any) -> jobs.Plan:
        """The plan of a job; the dataset and the model are made where they are missing."""
        if not BaseModel.get_or_none(BaseModel.name == MODEL):
            self.model()
        dataset = request.pop("dataset", "chats")
        if not list(queries.datasets().where(registry.Artifact.name == dataset)):
            self.dataset(dataset)
        return jobs.plan(self.settings, jobs.Request(MODEL, dataset, name=name, **request))

    def job(self, name: str = "first", **request: Any) -> Job:
        """A job that is being submitted: its rows and its folder are there, and nothing runs."""
        made = self.plan(name, **request)
        jobs._write(self.settings, made)
        with write_transaction():
            return jobs._insert(made)[0]

    def submission(self, job: Job) -> Submission:
        return Submission.get(Submission.object_id == job.id)

    def write_started(self, job: Job, **fields: Any) -> None:
        started = {
            "uuid": self.submission(job).uuid, "slurm_job_id": "", "attempt": 0, "node": os.uname().nodename,
            "address": "127.0.0.1", "pid": 1, "ticks": 1, "at": "2026-01-02T03:04:05Z",
        }  # fmt: skip
        write_atomic(self.root.job(job.id).started, json.dumps(started | fields))

    def write_exit(self, job: Job, code: int) -> None:
        record = {"uuid": self.submission(job).uuid, "attempt": 0, "exit_code": code, "at": "2026-01-02T03:05:05Z"}
        write_atomic(self.root.job(job.id).exit, json.dumps(record))

    def write_outcome(self, job: Job, outcome: Outcome) -> None:
        write_outcome(self.root.job(job.id).outcome, outcome)

    def trained(self, job: Job) -> Succeeded:
        """Leave in the job's folder what a training that succeeded leaves there."""
        adapter = self.root.job(job.id).adapter
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(b"weights of " + job.id.encode())
        (adapter / "adapter_config.json").write_text('{"r": 16}')
        files = {path.name: FileEntry(*sha256_file(path)) for path in adapter.iterdir()}
        outcome = Succeeded(
            steps=3, final_loss=0.5, examples=3, tokens=300, peak_memory_bytes=1,
            adapter=AdapterSummary(lora_rank=16, target_modules=["q_proj"], files=files),
        )  # fmt: skip
        self.write_started(job)
        self.write_outcome(job, outcome)
        self.write_exit(job, 0)
        return outcome

    def completed(self, name: str = "first", **request: Any) -> Job:
        """A job that was trained and registered, by way of what its node left behind and `sync`."""
        job = self.job(name, **request)
        self.trained(job)
        summary = self.sync()
        assert not summary.failed, summary.failed
        job = queries.find_job(job.id)
        assert job.status == "completed", job.error
        return job

    def endpoint(self, name: str = "helper", checkpoint: str = "first", status: str = "pending") -> Endpoint:
        """An endpoint whose rows and folder are there, and nothing runs."""
        from tfslurm.serving import endpoints

        made = endpoints.plan(self.settings, endpoints.Request(name, checkpoint))
        paths = self.root.endpoint(made.config.endpoint_id)
        paths.logs.mkdir(parents=True)
        write_atomic(paths.config, made.config.encode(), mode=0o444)
        write_atomic(paths.script, made.script, mode=0o555)
        with write_transaction():
            row = endpoints._insert(self.root, made)[0]
        Endpoint.update(status=status).where(Endpoint.id == row.id).execute()
        return queries.find_endpoint(row.id)


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """A fresh root; the local instance has two processes and is `auto`."""
    for name in ("TFSLURM_CONFIG", "TFSLURM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "site.yaml"
    settings = {name: {"instance": "local"} for name in ("training", "serving", "imports")}
    config.write_text(yaml.safe_dump({"root": str(tmp_path / "root"), **settings}))
    made = Installation(tmp_path, configuration.load(config, environ={}))
    install(made.settings)
    db.connect(made.settings)
    yield made
    database.obj.close()
    remove_tree(made.root.path)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write an executable shell script: `program("python", 'exit 3')`; its path, which has a blank in it."""

    def write(name: str, body: str) -> Path:
        path = tmp_path / "some programs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def wait_until(met: Callable[[], Any], timeout: float = 20.0) -> Any:
    """What `met` returns, once that is true."""
    deadline = time.monotonic() + timeout
    while not (value := met()):
        assert time.monotonic() < deadline, f"not met within {timeout:g} s"
        time.sleep(0.02)
    return value


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until
