"""Every path under the storage root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGING = ".staging-"
"""What the folder of an artifact is called while it grows, beside where it will be."""

LOCK = ".lock-"
"""What the file is called that one process at a time holds while it makes an artifact."""


@dataclass(frozen=True)
class Root:
    """The storage root: one folder, on a filesystem that every node mounts."""

    path: Path

    @property
    def catalog(self) -> Path:
        """The SQLite catalog, where no other database is configured."""
        return self.path / "catalog.db"

    @property
    def log(self) -> Path:
        """Tracebacks of unexpected errors."""
        return self.path / "tfslurm.log"

    @property
    def folders(self) -> tuple[Path, ...]:
        """What `init` makes."""
        names = "assembling datasets checkpoints imports jobs arrays endpoints cache models trash".split()
        return tuple(self.path / name for name in names)

    @property
    def cache(self) -> Path:
        """Tokens and compiled kernels: derivable, so it may be emptied at any time."""
        return self.path / "cache"

    @property
    def tokens(self) -> Path:
        return self.cache / "tokens"

    @property
    def trash(self) -> Path:
        """What is on its way out, each with the moment at which it came here in its name."""
        return self.path / "trash"

    def assembling(self, dataset_id: str) -> Path:
        """Where a dataset's owner writes until it is sealed."""
        return self.path / "assembling" / dataset_id

    def dataset(self, dataset_id: str) -> Path:
        """A dataset's canonical, read-only copy."""
        return self.path / "datasets" / dataset_id

    def checkpoint(self, checkpoint_id: str) -> Path:
        return self.path / "checkpoints" / checkpoint_id

    def model(self, name: str) -> Path:
        """A staged base model."""
        return self.path / "models" / name

    def job(self, job_id: str) -> JobPaths:
        return JobPaths(self.path / "jobs" / job_id)

    def endpoint(self, endpoint_id: str) -> EndpointPaths:
        return EndpointPaths(self.path / "endpoints" / endpoint_id)

    def array(self, name: str) -> ArrayPaths:
        """What is handed over together as the tasks of one array, which Slurm calls `name`."""
        return ArrayPaths(self.path / "arrays" / name)

    def import_(self, dataset_id: str) -> ImportPaths:
        return ImportPaths(self.path / "imports" / dataset_id)


@dataclass(frozen=True)
class ArrayPaths:
    """The folder of an array: one script for all its tasks."""

    folder: Path

    @property
    def script(self) -> Path:
        return self.folder / "script.sh"

    @property
    def cells(self) -> Path:
        """Line i + 1 is task i: the submission's uuid, a tab, the folder of what it runs."""
        return self.folder / "cells"


@dataclass(frozen=True)
class RunPaths:
    """The folder of something that runs: what was rendered for it, and what it reports back.

    The batch script writes `started.json` and `exit.json`; the program in it writes
    `outcome.json`. Each is written atomically, so that `sync` may read it at any moment.
    """

    folder: Path

    @property
    def script(self) -> Path:
        """The rendered batch script."""
        return self.folder / "script.sh"

    @property
    def started(self) -> Path:
        """`{uuid, slurm_job_id, attempt, node, address, pid, ticks, at}` of the newest attempt."""
        return self.folder / "started.json"

    @property
    def exit(self) -> Path:
        """`{uuid, attempt, exit_code, at}`, written by the script's exit trap."""
        return self.folder / "exit.json"

    @property
    def outcome(self) -> Path:
        """What the program inside says of its end."""
        return self.folder / "outcome.json"

    @property
    def stop(self) -> Path:
        """An empty file that asks what runs here to leave at the next safe point."""
        return self.folder / "stop"

    @property
    def leave(self) -> Path:
        """An empty file that asks what runs here to save its state and leave, to go on in another attempt."""
        return self.folder / "leave"

    def claim(self, uuid: str) -> Path:
        """Slurm's id of the job that runs as this submission: of two that Slurm took, the first to start."""
        return self.folder / f"claim-{uuid}"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def log(self, attempt: int) -> Path:
        """The output of one attempt, the first being 0: the batch script's, and the first process's."""
        return self.logs / f"attempt-{attempt}.log"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """The output of one of the other processes."""
        return self.logs / f"attempt-{attempt}.rank-{rank}.log"


class JobPaths(RunPaths):
    """A fine-tuning job's folder."""

    @property
    def config(self) -> Path:
        """The rendered training configuration, read-only."""
        return self.folder / "training.json"

    @property
    def deepspeed(self) -> Path:
        """The rendered DeepSpeed configuration, read-only."""
        return self.folder / "deepspeed.json"

    @property
    def prepared(self) -> Path:
        """`{tokens, plan, steps, …}`: where the tokens lie and what the plan came to."""
        return self.folder / "prepared.json"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.npz"

    @property
    def validation_plan(self) -> Path:
        return self.folder / "validation.npz"

    @property
    def cap(self) -> Path:
        """`{tokens, lowered, at}`: what one process takes at once, since more did not fit into its memory."""
        return self.folder / "cap.json"

    @property
    def trackers(self) -> Path:
        """What the trackers write that keep files: a folder each."""
        return self.folder / "trackers"

    @property
    def progress(self) -> Path:
        """`{step, steps, epoch, loss, tokens_per_second, eta_seconds, validation_loss, at}`."""
        return self.folder / "progress.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.folder / "metrics.jsonl"

    @property
    def resume(self) -> Path:
        """The newest resumable state: `state.json` and its tensors, replaced as a whole."""
        return self.folder / "resume"

    @property
    def adapter(self) -> Path:
        """The trained adapter, until it is published as a checkpoint."""
        return self.folder / "adapter"


class EndpointPaths(RunPaths):
    """An inference endpoint's folder."""

    @property
    def config(self) -> Path:
        """The rendered serving configuration, read-only."""
        return self.folder / "serving.json"

    @property
    def key(self) -> Path:
        """The API key, mode 0600."""
        return self.folder / "key"

    @property
    def state(self) -> Path:
        """What the supervisor publishes: status, health, address, port, attempt, time."""
        return self.folder / "state.json"

    @property
    def engine_log(self) -> Path:
        return self.logs / "engine.log"


class ImportPaths(RunPaths):
    """The folder of an import that runs in the background."""

    @property
    def config(self) -> Path:
        """`{dataset_id, source, format, field_map, staging, instance}`; no secret of the source is in it."""
        return self.folder / "import.json"

    @property
    def source(self) -> Path:
        """The source as it was given, mode 0600, where it holds a secret; removed when the import ends."""
        return self.folder / "source"

    @property
    def spool(self) -> Path:
        """What was downloaded so far, with its journal; removed when the import ends."""
        return self.folder / "spool"

    @property
    def objects(self) -> Path:
        """The source's objects, under their names in the dataset."""
        return self.spool / "objects"

    @property
    def lock(self) -> Path:
        """Held by the one process that imports."""
        return self.folder / "lock"

    @property
    def progress(self) -> Path:
        """`{phase, bytes_done, bytes_total, at}`; the phase is `download` or `ingest`."""
        return self.folder / "progress.json"
