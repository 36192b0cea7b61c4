"""Jobs that die: the job's view says why, and there is no checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from .conftest import MODEL, Site, trainers

pytestmark = [pytest.mark.slurm, pytest.mark.train]


def start(site: Site, name: str, *more: str) -> Path:
    """Start a job that would run for long; its folder."""
    view = site.json("job", "create", "--model", MODEL, "--dataset", "chats", "--name", name, "--epochs", "90", *more)
    return Path(view["location"])


def wait_until_it_trains(site: Site, name: str) -> None:
    deadline = time.monotonic() + 180
    while not (site.json("job", "show", name)["progress"] or {}).get("step"):
        assert time.monotonic() < deadline, site("job", "logs", name).stdout
        time.sleep(1)


def no_checkpoint(site: Site) -> bool:
    return site.json("checkpoint", "list") == [] and list((site.root / "checkpoints").iterdir()) == []


def test_a_trainer_that_is_killed_ends_the_job_in_error(site: Site) -> None:
    folder = start(site, "killed")
    wait_until_it_trains(site, "killed")
    os.kill(trainers(folder)[0], signal.SIGKILL)
    refused = site("job", "wait", "killed", "--timeout", "120", expect=9)
    view = site.json("job", "show", "killed")
    assert view["status"] == "error"
    assert "a process was killed" in view["error"]
    assert any("Killed" in line for line in view["log_tail"])
    assert "killed" in refused.stderr
    assert view["checkpoint"] is None
    assert no_checkpoint(site)


def test_a_job_that_wants_more_memory_than_it_asked_for_ends_in_error(site: Site) -> None:
    start(site, "hungry", "--instance", "tight")
    site("job", "wait", "hungry", "--timeout", "180", expect=9)
    view = site.json("job", "show", "hungry")
    assert view["status"] == "error"
    assert view["error"]
    assert view["log_tail"]
    assert no_checkpoint(site)


def test_what_slurm_refuses_is_told_in_its_own_words(site: Site) -> None:
    refused = site(
        "job", "create", "--model", MODEL, "--dataset", "chats", "--name", "refused", "--instance", "nowhere", expect=5
    )
    assert "nvalid partition" in refused.stderr
    assert "Traceback" not in refused.stderr
    site("job", "show", "refused", expect=3)  # it was asked before anything was written


def test_a_dry_run_prints_what_would_run_and_slurms_estimate_and_changes_nothing(site: Site) -> None:
    before = site.json("job", "list")
    said = site("job", "create", "--model", MODEL, "--dataset", "chats", "--dry-run").stdout
    assert all(part in said for part in ('"effective_batch_size": 8', '"zero_optimization"', "#SBATCH --job-name="))
    assert "to start at" in said.partition("# --- sbatch --test-only")[2]
    nowhere = ("--dry-run", "--instance", "nowhere")
    refused = site("job", "create", "--model", MODEL, "--dataset", "chats", *nowhere, expect=5)
    assert "nvalid partition" in refused.stderr
    assert site.json("job", "list") == before


def test_a_job_cancelled_by_hand_is_stopped(site: Site) -> None:
    start(site, "cancelled")
    wait_until_it_trains(site, "cancelled")
    job_id = site.json("job", "show", "cancelled")["slurm_job_id"]
    assert os.spawnlp(os.P_WAIT, "scancel", "scancel", job_id) == 0
    site("job", "wait", "cancelled", "--timeout", "120", expect=9)
    assert site.json("job", "show", "cancelled")["status"] == "stopped"
    assert no_checkpoint(site)


def test_a_stopped_job_leaves_at_a_step_boundary_without_a_checkpoint(site: Site) -> None:
    start(site, "stopped")
    wait_until_it_trains(site, "stopped")
    assert site.json("job", "stop", "stopped")["status"] == "stopping"
    site("job", "wait", "stopped", "--timeout", "120", expect=9)
    view = site.json("job", "show", "stopped")
    assert (view["status"], view["checkpoint"]) == ("stopped", None)
    assert no_checkpoint(site)
    refused = site("job", "stop", "stopped", expect=4)
    assert "ended already" in refused.stderr
