"""The whole chain on a real Slurm: dataset, jobs on one and two nodes, checkpoint, endpoint, lineage."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .conftest import MODEL, Site, conversations, sacct

pytestmark = [pytest.mark.slurm, pytest.mark.train]

HYPERPARAMETERS = {
    "learning_rate": 0.0015,
    "epochs": 2,
    "effective_batch_size": 5,
    "max_seq_length": 128,
    "lora_rank": 8,
    "lora_alpha": 24,
}


def create(site: Site, name: str, *more: str) -> dict:
    options = [word for key, value in HYPERPARAMETERS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return site.json("job", "create", "--model", MODEL, "--dataset", "chats", "--name", name, *options, *more, "--wait")


@pytest.fixture(scope="module")
def one(site: Site) -> dict:
    return create(site, "one")


@pytest.fixture(scope="module")
def two(site: Site, one: dict) -> dict:
    return create(site, "two", "--instance", "two-nodes")


def losses(site: Site, name: str) -> list[float]:
    return [row["loss"] for row in site.json("job", "metrics", name)]


def test_an_import_runs_as_a_slurm_job_and_seals_itself(site: Site, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(conversations(30))
    view = site.json("dataset", "import", "more", str(tmp_path), "--format", "conversational", "--wait")
    assert (view["status"], view["row_count"], view["file_count"]) == ("ready", 30, 1)
    assert (Path(view["location"]) / "more.jsonl").read_text() == conversations(30)


def test_a_two_process_job_on_one_node_ends_with_a_checkpoint(site: Site, one: dict) -> None:
    assert one["status"] == "completed"
    assert one["hyperparameters"] == HYPERPARAMETERS
    assert one["progress"]["step"] == one["progress"]["steps"] == 6  # ceil(12 rows / 5) steps, twice
    assert losses(site, "one")[-1] < losses(site, "one")[0]
    checkpoint = site.json("checkpoint", "show", one["checkpoint"])
    assert (checkpoint["job"], checkpoint["metadata"]["lora_rank"]) == (one["id"], 8)
    site("checkpoint", "verify", one["checkpoint"])


def test_a_job_on_two_nodes_sees_the_same_losses(site: Site, one: dict, two: dict) -> None:
    assert losses(site, "two") == pytest.approx(losses(site, "one"), rel=0.02)


def test_sacct_shows_the_jobs_under_the_names_of_their_submissions(site: Site, one: dict, two: dict) -> None:
    for job, nodes in ((one, "1"), (two, "2")):
        script = (Path(job["location"]) / "script.sh").read_text()
        name = re.search(r"^#SBATCH --job-name=(\S+)$", script, re.MULTILINE)[1]
        assert sacct(job["slurm_job_id"], "JobName,NNodes", ended=True) == ["COMPLETED", name, nodes]


def test_a_dataset_is_kept_while_a_job_may_read_it(site: Site, one: dict) -> None:
    waiting = site.json("job", "create", "--model", MODEL, "--dataset", "chats", "--epochs", "50")
    refused = site("dataset", "delete", "chats", "--yes", expect=4)
    assert waiting["name"] in refused.stderr
    assert site.json("dataset", "show", "chats")["status"] == "ready"
    site("job", "stop", waiting["name"])
    site("job", "wait", waiting["name"], expect=9)
    assert site.json("job", "show", waiting["name"])["status"] == "stopped"


@pytest.mark.vllm
def test_an_endpoint_on_the_reserved_node_serves_the_checkpoint_until_it_is_stopped(site: Site, two: dict) -> None:
    created = site.json("endpoint", "create", "helper", "--checkpoint", two["checkpoint"], "--wait")
    try:
        assert created["status"] == "healthy"
        assert sacct(created["slurm_job_id"], "Reservation,NodeList") == ["RUNNING", "serving", "n4"]
        assert ask(created["url"], created["key"], "helper")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(created["url"], "wrong", "helper")
        assert site("endpoint", "chat", "helper", "What is item 3?", "--max-tokens", "8").stdout.strip()
        assert "helper" in site("checkpoint", "delete", two["checkpoint"], "--yes", expect=4).stderr

        chain = site.json("lineage", "helper")
        assert chain["endpoint"]["checkpoint"] == chain["checkpoint"]["id"] == two["checkpoint"]
        assert chain["checkpoint"]["job"] == chain["job"]["id"] == two["id"]
        assert chain["job"]["hyperparameters"] == HYPERPARAMETERS
        assert chain["dataset"]["name"] == "chats"
        assert chain["base_model"]["name"] == MODEL
    finally:
        site("endpoint", "stop", "helper", "--wait")
    assert site.json("endpoint", "show", "helper")["status"] == "stopped"
    assert sacct(created["slurm_job_id"], "JobID", ended=True)[0] in ("CANCELLED", "COMPLETED")


def ask(url: str, key: str, model: str) -> str:
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["text"]
