"""Jobs of the real trainer on a small model, on nodes that are slow until a job is told to hurry.

All of them are the same run but for their names, so that the losses of one that was interrupted must be those of one
that was not.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tfslurm.files import read_json, write_atomic

from .conftest import TOP, Site, add_dataset, conversations, make_site, python_of, slurm, wait_until

MODEL = "tiny"

HYPERPARAMETERS = {"effective-batch-size": 4, "max-seq-length": 96, "lora-rank": 4, "lora-alpha": 8, "epochs": 15}
ROWS = 32
STEPS = 120

STEP_SECONDS = 1.5
"""What a slow step takes more: all of them three minutes."""

STOP_TIMEOUT = 30

UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

SLOW_NODE = """
import sys

if "tfslurm.training.trainer" in sys.orig_argv:
    import os
    import time
    from pathlib import Path

    from tfslurm.training import schedule

    folder, learning_rate = Path(sys.orig_argv[-1]), schedule.learning_rate
    hurry, attempt = folder / "hurry", int(os.environ["TFSLURM_ATTEMPT"])

    def slowly(*step, **options):  # it is asked for once a step
        while (folder / "freeze").exists():
            (folder / "frozen").touch()
            time.sleep(0.1)
        if not hurry.exists() or attempt < int(hurry.read_text()):
            time.sleep(STEP_SECONDS)
        return learning_rate(*step, **options)

    schedule.learning_rate = slowly
"""
"""Python imports `sitecustomize` at its start, before anything of ours."""

MAKE_MODEL = """
import sys
from pathlib import Path
from tiny_model import CHATML, save_model, save_tokenizer
folder = Path(sys.argv[1])
save_tokenizer(folder, CHATML)
save_model(folder)
"""


def instances(slow: Path) -> dict[str, Any]:
    """Everything runs on n1 but what is preempted, on n2, and what chooses for itself; n4 is reserved."""
    own = {"purposes": ["training"], "memory": "1500M", "time": 15}
    at_leisure = {**own, "prologue": {"environment": {"PYTHONPATH": str(slow)}}}
    copy = {"purposes": ["import"], "memory": "500M", "time": 5}
    return {
        "quick": {**own, "options": {"nodelist": "n1"}},
        "slow": {**at_leisure, "options": {"nodelist": "n1"}},
        "minute": {**at_leisure, "time": 1, "options": {"nodelist": "n1"}},
        "movable": {**at_leisure, "options": {"exclude": "n2"}},
        "preemptible": {
            **at_leisure,
            "processes_per_node": 2,
            "memory": "3G",
            "partition": "scavenge",
            "options": {"nodelist": "n2", "exclusive": True},
        },
        "copy": {**copy, "options": {"exclude": "n2"}},
    }


def make_slow_site(folder: Path) -> Site:
    """Initialised, with the small model and a ready dataset."""
    slow, model = folder / "slow", folder / MODEL
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW_NODE.replace("STEP_SECONDS", str(STEP_SECONDS)))
    made = [python_of("train"), "-c", MAKE_MODEL, model]
    subprocess.run(made, check=True, cwd=TOP / "tests" / "training", capture_output=True, timeout=120)
    site = make_site(
        folder,
        slurm={"poll_floor": 1, "leave_seconds": 5, "stop_timeout": STOP_TIMEOUT},
        training={"instance": "slow", "trainer": {"dtype": "float32", "save_minutes": 0.02}},
    )
    site.config.with_name("instances.yaml").write_text(yaml.safe_dump({"instances": instances(slow)}))
    site("model", "add", MODEL, "--path", str(model))
    add_dataset(site, "chats", conversations(ROWS))
    return site


@dataclass(frozen=True)
class Run:
    """A job that was started."""

    site: Site
    name: str
    folder: Path

    @classmethod
    def start(cls, site: Site, name: str, instance: str = "slow", **environment: str) -> Run:
        return cls.of(site, site.json(*words(name, instance), **environment))

    @classmethod
    def of(cls, site: Site, view: dict[str, Any]) -> Run:
        return cls(site, view["name"], Path(view["location"]))

    @property
    def view(self) -> dict[str, Any]:
        return self.site.json("job", "show", self.name)

    @property
    def log(self) -> str:
        return self.site("job", "logs", self.name).stdout

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def losses(self) -> list[float]:
        """Of all steps, each of which was reported once and in its turn."""
        metrics = self.metrics
        assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
        return [line["loss"] for line in metrics]

    @property
    def submission(self) -> str:
        """The newest one's uuid: Slurm's name for it."""
        script = (self.folder / "script.sh").read_text()
        return re.search(r"^#SBATCH --job-name=(\S+)$", script, re.MULTILINE)[1]

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        return [found for found in self.site.json("checkpoint", "list") if found["job"] == self.view["id"]]

    def hurry(self, attempt: int = 0) -> None:
        """Be slow no longer, from this attempt on."""
        write_atomic(self.folder / "hurry", str(attempt))

    def freeze(self) -> None:
        """Not come to the end of a step any more."""
        (self.folder / "freeze").touch()
        wait_until((self.folder / "frozen").exists, f"{self.name} stands still")

    def until_saved(self, attempt: int = 0) -> dict[str, Any]:
        """Wait until this attempt has saved a state; what started.json says of it."""
        path = self.folder / "resume" / "state.json"

        def saved() -> bool:
            ended = read_json(self.folder / "exit.json")
            assert not ended or ended["exit_code"] in (0, 75), self.log
            return (read_json(path) or {}).get("attempt", -1) >= attempt

        wait_until(saved, f"{self.name} saves its state")
        return read_json(self.folder / "started.json")

    def until_completed(self, timeout: float = 240) -> dict[str, Any]:
        """Wait for the end: one job, and one checkpoint that is whole."""
        self.site("job", "wait", self.name, "--timeout", str(timeout), timeout=timeout + 60)
        view = self.view
        assert [found["id"] for found in self.checkpoints] == [view["checkpoint"]]
        assert [job["id"] for job in self.site.json("job", "list", "--name", self.name)] == [view["id"]]
        self.site("checkpoint", "verify", view["checkpoint"])
        return view

    def until_stopped(self) -> dict[str, Any]:
        """Wait for the end: one job, and no checkpoint."""
        self.site("job", "wait", self.name, "--timeout", "120", expect=9)
        view = self.view
        assert (view["status"], view["checkpoint"], self.checkpoints) == ("stopped", None, [])
        assert [job["id"] for job in self.site.json("job", "list", "--name", self.name)] == [view["id"]]
        return view

    def usage(self) -> dict[str, Any]:
        """What it used, once accounting knows; a sync asks, as cron's would."""

        def told() -> dict[str, Any] | None:
            self.site("sync", "--quiet")
            return self.view["usage"]

        return wait_until(told, f"accounting tells what {self.name} used")

    @property
    def slurm_state(self) -> str:
        """How accounting, once it knows, says that the newest submission ended, of which there is one job."""
        id_, command = self.view["slurm_job_id"], ("sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State")

        def ended() -> str | None:
            jobs = [line.split("|") for line in slurm(*command, f"--name={self.submission}").splitlines()]
            assert {job for job, _ in jobs} <= {id_}
            (_, state), *_ = jobs or [("", "PENDING")]
            return None if state in UNFINISHED else state.split()[0]

        return wait_until(ended, f"accounting knows the end of {self.name}")


def words(name: str, instance: str) -> list[str]:
    """The command that starts a job."""
    options = [word for key, value in HYPERPARAMETERS.items() for word in (f"--{key}", str(value))]
    given = ["--model", MODEL, "--dataset", "chats", "--name", name, "--instance", instance]
    return ["job", "create", *given, *options]
