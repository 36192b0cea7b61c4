"""submitit's executors, submitting a rendered script instead of a pickled function.

submitit 1.5 has no hook for a script of one's own: its `_submit_command` writes one, runs sbatch without a time
limit and leaves the file behind when sbatch fails. These hand ours over, through the Slurm client or to this
machine, and return submitit's own jobs: futures. An array's tasks are one script, so that `map_array`, which
would make an executor of submitit's own class, is not needed.
"""

from __future__ import annotations

from pathlib import Path

import submitit
from submitit.local.local import LocalJob

from tfslurm.slurm import local
from tfslurm.slurm.client import Slurm, SlurmUnreachable


class ScriptJob(submitit.SlurmJob):
    """A submitted script; of an array, all of it."""

    cluster: str | None = None
    """The cluster's name, where sbatch says it: on a federation."""


class ScriptExecutor(submitit.SlurmExecutor):
    """Submits `script` as it is."""

    job_class = ScriptJob

    def __init__(self, script: Path, slurm: Slurm) -> None:
        super().__init__(folder=script.parent / "logs")
        self.script = script
        self.slurm = slurm

    def submit_script(self) -> ScriptJob:
        """Raises SlurmUnreachable where it may or may not have been taken, SlurmRefused where it was not."""
        return self._submit_command("")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", "--parsable", str(submission_file_path)]

    def _submit_command(self, command: str) -> ScriptJob:
        answer = self.slurm.run(*self._make_submission_command(self.script)).strip()
        job_id, _, cluster = answer.partition("\n")[0].partition(";")
        if not job_id.isdigit():
            raise SlurmUnreachable(f"sbatch answered {answer!r}, which is no job id")
        job = self.job_class(folder=self.folder, job_id=job_id)
        job.cluster = cluster or None
        return job


class LocalScriptExecutor(submitit.LocalExecutor):
    """Runs `script` on this machine, in the background; it outlives this process."""

    def __init__(self, script: Path) -> None:
        super().__init__(folder=script.parent / "logs")
        self.script = script

    def submit_script(self) -> LocalJob:
        """The job's id is the handle of its process."""
        return self._submit_command("")

    def _submit_command(self, command: str) -> LocalJob:
        return LocalJob(folder=self.folder, job_id=local.start(self.script))
