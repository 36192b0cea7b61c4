"""Two submitters, a cron job that syncs, and every node at its job's end, at once: then the catalog equals sacct.

TFSLURM_STORM is for how many seconds; 20 where it is not set. A script stands in for the trainer.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Site, add_dataset, conversations, faults_wanted, make_site, slurm, wait_until

pytestmark = [pytest.mark.slurm, faults_wanted]

SECONDS = float(os.environ.get("TFSLURM_STORM", 20))

TRAINER = """#!/bin/bash
[[ $2 == *prepare ]] && exit 0
folder=$3
end() { printf '%s\\n' "$1" >"$folder/outcome.new" && mv "$folder/outcome.new" "$folder/outcome.json"; }
case $(grep -o '"seed": *[0-9]*' "$folder/training.json") in
  *0)
    mkdir "$folder/adapter"
    echo "weights of $folder" >"$folder/adapter/adapter_model.safetensors"
    sum=$(sha256sum <"$folder/adapter/adapter_model.safetensors")
    file="{\\"size\\": $(stat -c %s "$folder/adapter/adapter_model.safetensors"), \\"sha256\\": \\"${sum%% *}\\"}"
    adapter="{\\"lora_rank\\": 16, \\"target_modules\\": [], \\"files\\": {\\"adapter_model.safetensors\\": $file}}"
    end "{\\"result\\": \\"succeeded\\", \\"steps\\": 1, \\"final_loss\\": 0.5, \\"adapter\\": $adapter, \\
      \\"examples\\": 1, \\"tokens\\": 1, \\"peak_memory_bytes\\": 1}" ;;
  *1) exit 3 ;;
  *)
    until [[ -e $folder/stop ]]; do sleep 0.1; done
    end '{"result": "stopped", "step": 1}' ;;
esac
"""
"""What becomes of a job, its seed says: it succeeds, fails, or goes on until somebody ends it."""

FATES = {
    "succeeds": ("completed", {"COMPLETED"}),
    "fails": ("error", {"FAILED"}),
    "scancelled": ("stopped", {"CANCELLED"}),
    "stopped": ("stopped", {"CANCELLED", "COMPLETED"}),
}
"""What the catalog and Slurm have to say of each in the end; one that was stopped at a step has left well."""


@pytest.fixture(scope="module")
def site(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("storm")
    trainer, model = folder / "trainer", folder / "tiny"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    environments = {"core": sys.executable, "train": str(trainer)}
    site = make_site(folder, environments=environments, training={"instance": "small"}, serving={"instance": "auto"})
    small = {"time": 5, "memory": "100M"}
    site.config.with_name("instances.yaml").write_text(yaml.safe_dump({"instances": {"small": small}}))
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    register_model(site, model)
    add_dataset(site, "chats", conversations(2))
    return site


def register_model(site: Site, folder: Path) -> None:
    """A base model whose bytes are none, which `model add` would refuse."""
    row = ("tiny", "r1", "sha256:1", str(folder), str(folder), '{"max_position_embeddings": 2048}', "somebody", 0)
    with closing(sqlite3.connect(site.root / "catalog.db")) as catalog, catalog:
        catalog.execute("INSERT INTO base_model VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


class Storm:
    """Threads that run commands until the time is up."""

    def __init__(self, site: Site) -> None:
        self.site, self.until, self.failures = site, time.monotonic() + SECONDS, []
        self.threads: list[threading.Thread] = []

    def repeat(self, body: Callable[[int], None]) -> None:
        def run() -> None:
            try:
                for number in count():
                    if time.monotonic() >= self.until:
                        return
                    body(number)
            except BaseException as error:
                self.failures.append(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def submitter(self, name: str) -> Callable[[int], None]:
        def submit(number: int) -> None:
            kind = list(FATES)[number % len(FATES)]
            options = ["--name", f"{kind}-{name}-{number}", "--seed", str(list(FATES).index(kind))]
            job = self.site.json("job", "create", "--model", "tiny", "--dataset", "chats", *options)
            if kind == "scancelled":
                slurm("scancel", job["slurm_job_id"])
            elif kind == "stopped":
                self.site("job", "stop", job["id"])

        return submit

    def cron(self, _: int) -> None:
        self.site("sync", "--quiet")
        time.sleep(0.5)


def rows(site: Site, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{site.root}/catalog.db?mode=ro", uri=True)) as catalog:
        return catalog.execute(query).fetchall()


def everything(site: Site) -> list[list[tuple[Any, ...]]]:
    return [rows(site, f"SELECT * FROM {table}") for table in ("job", "submission", "artifact", "checkpoint", "event")]


def accounted(since: datetime) -> dict[str, tuple[str, str]]:
    """Name and state of every job that was submitted since, by its id, as sacct has them."""
    fields = "--format=JobID,JobName,State,Submit"
    said = slurm("sacct", "-X", "--noheader", "--parsable2", fields, f"--starttime={since:%Y-%m-%dT%H:%M:%S}")
    lines = [line.split("|") for line in said.splitlines()]
    new = [line for line in lines if datetime.fromisoformat(line[3]) >= since.replace(microsecond=0)]
    return {job_id: (name, state.split()[0]) for job_id, name, state, _ in new}


def test_after_a_storm_the_catalog_equals_sacct(site: Site) -> None:
    begun, storm = datetime.now(), Storm(site)
    for body in (storm.submitter("a"), storm.submitter("b"), storm.cron):
        storm.repeat(body)
    for thread in storm.threads:
        thread.join()
    assert not storm.failures

    def unended() -> int:
        site("sync", "--quiet")
        return len(rows(site, "SELECT 1 FROM job WHERE status NOT IN ('completed', 'error', 'stopped')"))

    wait_until(lambda: not unended(), "all jobs end", 120 + SECONDS)
    submitted = rows(
        site, "SELECT s.job_id, s.uuid, s.state, j.name, j.status FROM submission s JOIN job j ON j.id = s.object_id"
    )
    assert len(submitted) >= 6, "the machine is too slow for a storm"
    assert {state for _, _, state, _, _ in submitted} == {"ended"}

    ours = {job_id: uuid for job_id, uuid, _, _, _ in submitted}
    wait_until(
        lambda: len(known := accounted(begun)) >= len(ours) and not unfinished(known), "accounting knows all ends"
    )
    theirs = accounted(begun)
    assert {job_id: name for job_id, (name, _) in theirs.items()} == ours
    assert len(set(ours.values())) == len(submitted) == len(rows(site, "SELECT id FROM job"))
    for job_id, _, _, name, status in submitted:
        expected, states = FATES[name.partition("-")[0]]
        assert (status, theirs[job_id][1] in states) == (expected, True), (name, status, theirs[job_id])

    succeeded = sum(status == "completed" for *_, status in submitted)
    assert len(rows(site, "SELECT DISTINCT job_id FROM checkpoint")) == succeeded
    ends = Counter(of for (of,) in rows(site, ENDS))
    assert set(ends.values()) == {1}
    assert len(ends) == len(submitted)
    fates = Counter(name.partition("-")[0] for _, _, _, name, _ in submitted)
    print(f"{len(submitted)} jobs in {SECONDS:g} s of storm: {dict(fates)}")


ENDS = "SELECT object_id FROM event WHERE kind = 'job' AND to_status IN ('completed', 'error', 'stopped')"


def unfinished(jobs: dict[str, tuple[str, str]]) -> list[str]:
    return [job_id for job_id, (_, state) in jobs.items() if state in ("PENDING", "RUNNING", "COMPLETING")]


def test_one_more_sync_changes_nothing(site: Site) -> None:
    def used() -> bool:
        site("sync", "--quiet")
        return not rows(site, "SELECT 1 FROM submission WHERE usage IS NULL")

    wait_until(used, "accounting tells of all")
    before = everything(site)
    site("sync", "--quiet")
    assert everything(site) == before
