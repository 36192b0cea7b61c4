"""submitit's executor, submitting a rendered script instead of a pickled function.

submitit 1.5 has no hook for a script of one's own: its `_submit_command` writes one, runs sbatch without a time
limit and leaves the file behind when sbatch fails. This one hands ours to sbatch through the Slurm client, and
returns submitit's own job: a future.
"""

from __future__ import annotations

from pathlib import Path

import submitit

from tfslurm.slurm.client import Slurm


class ScriptJob(submitit.SlurmJob):
    """A submitted script."""

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
        answer = self.slurm.run(*self._make_submission_command(self.script))
        job_id, _, cluster = answer.strip().partition(";")
        job = self.job_class(folder=self.folder, job_id=job_id)
        job.cluster = cluster or None
        return job
