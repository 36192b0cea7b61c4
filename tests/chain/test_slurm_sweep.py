"""A sweep on a real Slurm with the real trainer: one array, a checkpoint a cell, ranked."""

from __future__ import annotations

import pytest

from .conftest import MODEL, Site, sacct

pytestmark = [pytest.mark.slurm, pytest.mark.train]

FIXED = ("--epochs", "3", "--effective-batch-size", "6", "--max-seq-length", "96", "--lora-alpha", "16")


@pytest.fixture(scope="module")
def sweep(site: Site) -> dict:
    grid = ("--grid", "learning-rate=2e-3,1e-6", "--max-parallel", "1")
    words = ("job", "sweep", "--model", MODEL, "--dataset", "chats", "--name", "rates", *grid, *FIXED)
    return site.json(*words, "--lora-rank", "8", "--wait")


def test_every_cell_is_trained_with_its_own_numbers_and_has_its_own_checkpoint(site: Site, sweep: dict) -> None:
    assert (sweep["status"], sweep["statuses"]) == ("completed", {"completed": 2})
    for index, rate in enumerate((2e-3, 1e-6)):
        job = site.json("job", "show", f"rates-{index}")
        assert (job["hyperparameters"]["learning_rate"], job["hyperparameters"]["lora_rank"]) == (rate, 8)
        assert job["sweep"] == sweep["id"]
        chain = site.json("lineage", job["checkpoint"])
        assert (chain["job"]["id"], chain["job"]["hyperparameters"]["learning_rate"]) == (job["id"], rate)
        assert chain["dataset"]["name"] == "chats"
        site("checkpoint", "verify", job["checkpoint"])


def test_the_better_rate_comes_first(site: Site, sweep: dict) -> None:
    cells = site.json("job", "cells", "rates")
    assert [cell["name"] for cell in cells] == ["rates-0", "rates-1"]
    assert cells[0]["loss"] < cells[1]["loss"]
    assert {cell["loss_of"] for cell in cells} == {"training"}
    assert all(cell["checkpoint"] for cell in cells)


def test_slurm_knows_them_as_the_tasks_of_one_array(site: Site, sweep: dict) -> None:
    ids = [site.json("job", "show", f"rates-{index}")["slurm_job_id"] for index in (0, 1)]
    assert ids[0].partition("_")[0] == ids[1].partition("_")[0]
    starts = [sacct(job_id, "Start,End", ended=True) for job_id in ids]
    assert [state for state, _, _ in starts] == ["COMPLETED", "COMPLETED"]
    assert starts[1][1] >= starts[0][2], "--max-parallel 1: the second began before the first had ended"
