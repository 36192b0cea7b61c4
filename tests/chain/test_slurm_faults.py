"""What goes wrong on clusters, done to a real Slurm and the real trainer: each job ends right, and once.

The slow ones are begun first and looked at last: a node that dies is noticed after 20 seconds, and what is started
again waits for 15.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tfslurm.files import read_json

from .conftest import TOP, Site, conversations, devcluster, faults_wanted, slurm, wait_until
from .slow_jobs import STEPS, STOP_TIMEOUT, Run, make_slow_site, words

pytestmark = [pytest.mark.slurm, pytest.mark.train, faults_wanted]

LEAVES = int(os.environ.get("TFSLURM_TEST_LEAVES", 1))
"""How often the job of three minutes leaves at its walltime of one, before it hurries; with 9 it never does."""


@pytest.fixture(scope="module")
def site(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = make_slow_site(tmp_path_factory.mktemp("slow"))
    slurm("scontrol", "update", "NodeName=n1", "Weight=100")  # whoever may choose gets another node
    yield site
    for job in site.json("job", "list"):  # a controller that was killed may believe that one which has ended still runs
        slurm("scancel", "--quiet", f"--name={Run.of(site, job).submission}")
    slurm("scontrol", "update", "NodeName=n1", "Weight=1")
    devcluster("up")


class StalledServer(ThreadingHTTPServer):
    """Serves rows on the web: half of them, until it is released."""

    daemon_threads = True
    rows = conversations(100).encode()

    def __init__(self) -> None:
        self.stalls, self.released = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), _Stalled)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/rows.jsonl"


class _Stalled(BaseHTTPRequestHandler):
    server: StalledServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.rows)))
        self.end_headers()
        half = len(self.server.rows) // 2
        try:
            self.wfile.write(self.server.rows[:half])
            if "Range" not in self.headers:
                self.server.stalls.set()
                self.server.released.wait()
            self.wfile.write(self.server.rows[half:])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was killed, or has seen enough

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Disturbed:
    """What was begun, and disturbed, before the first test."""

    whole: Run
    """The one that was left alone."""
    minute: Run
    preempted: Run
    moved: Run
    node: str
    """The one that died under `moved`, and under the import."""
    imported: str


@pytest.fixture(scope="module")
def disturbed(site: Site) -> Iterator[Disturbed]:
    server = StalledServer()
    minute = Run.start(site, "minute", "minute")
    minute.hurry(LEAVES)
    minute.until_saved()
    preempted, moved = Run.start(site, "preempted", "preemptible"), Run.start(site, "moved", "movable")
    imported = site.json("dataset", "import", "web", server.url, "--format", "conversational")["id"]
    whole = Run.start(site, "whole", "quick")
    preempted.until_saved()
    slurm("sbatch", "--partition=urgent", "--nodelist=n2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    node = moved.until_saved()["node"]
    assert server.stalls.wait(60)
    assert read_json(site.root / "imports" / imported / "started.json")["node"] == node
    devcluster("kill", node)
    server.released.set()
    for run in (preempted, moved):
        run.hurry(1)
    yield Disturbed(whole, minute, preempted, moved, node, imported)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def ordered(site: Site, disturbed: Disturbed) -> dict[str, Run]:
    """Slow jobs that train side by side; two never come to the end of a step."""
    runs = {name: Run.start(site, name) for name in ("requeued", "halted", "stubborn", "hung")}
    requeue(runs["requeued"])
    runs["requeued"].hurry(1)
    for name in ("stubborn", "hung"):
        wait_until(lambda run=runs[name]: run.metrics, f"{name} trains")
        runs[name].freeze()
    return runs


def requeue(run: Run) -> None:
    run.until_saved()
    slurm("scontrol", "requeue", run.view["slurm_job_id"])


def went_on(run: Run) -> bool:
    """Whether a later attempt began where the one before it had left off."""
    return f"going on after step {first_step_of(run, 1) - 1}, which attempt 0 saved" in run.log


def first_step_of(run: Run, attempt: int) -> int:
    return min(line["step"] for line in run.metrics if line["attempt"] == attempt)


def test_a_listing_does_not_wait_for_a_slurm_that_hangs(site: Site, disturbed: Disturbed, tmp_path: Path) -> None:
    for name in ("squeue", "sacct", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    expected = {run.name for run in (disturbed.whole, disturbed.minute, disturbed.preempted, disturbed.moved)}

    def seconds() -> float | None:
        time.sleep(1.1)  # the site's floor
        begun = time.monotonic()
        listed = site("job", "list", "--json", PATH=f"{tmp_path}:{os.environ['PATH']}")
        took = time.monotonic() - begun
        assert expected <= {job["name"] for job in json.loads(listed.stdout)}
        if not listed.stderr:
            return None  # somebody else, a node where a job ended, has just asked a Slurm that answers
        assert re.search(r"Slurm does not answer \(.+ did not answer within [0-9.]+ s\)", listed.stderr)
        return took

    best = min(wait_until(seconds, "a listing asks Slurm") for _ in range(3))
    assert best < 2 * load()


def load() -> float:
    """How much slower this machine may be than an idle one, for what it has to do besides."""
    return max(1.0, os.getloadavg()[0] / os.cpu_count())


def test_an_undisturbed_job_tells_what_it_used(disturbed: Disturbed) -> None:
    view = disturbed.whole.until_completed()
    assert disturbed.whole.slurm_state == "COMPLETED"
    assert len(disturbed.whole.losses) == STEPS
    used = disturbed.whole.usage()
    assert (view["attempt"], used["runs"], used["gpu_hours"], used["nodes"]) == (0, 1, 0, ["n1"])
    assert used["cpu_hours"] > 0
    assert used["queue_wait_seconds"] >= 0
    assert used["peak_memory_bytes"] > 50_000_000


def test_a_job_waits_for_drained_nodes_and_is_cancelled_at_once(site: Site) -> None:
    slurm("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=maintenance")
    try:
        run = Run.start(site, "waiting", "quick")
        wait_until(lambda: (run.view["slurm_reason"] or "").startswith("ReqNodeNotAvail"), "it waits")
        run.site("job", "stop", run.name)
        run.until_stopped()
    finally:
        slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert run.slurm_state == "CANCELLED"
    assert not (run.folder / "started.json").exists()


def test_a_second_stop_kills(ordered: dict[str, Run]) -> None:
    run, begun = ordered["stubborn"], time.monotonic()
    for name in ("hung", "stubborn"):
        assert run.site.json("job", "stop", name)["status"] == "stopping"
    time.sleep(2)
    assert run.view["status"] == "stopping"
    run.site("job", "stop", run.name)
    run.until_stopped()
    assert time.monotonic() - begun < STOP_TIMEOUT
    assert run.slurm_state == "CANCELLED"


def test_a_stop_while_slurm_is_about_to_start_a_job_again_ends_it(ordered: dict[str, Run]) -> None:
    run = ordered["halted"]
    requeue(run)
    id_ = run.view["slurm_job_id"]
    wait_until(lambda: slurm("squeue", "--noheader", "--format=%T", f"--jobs={id_}") == "PENDING", "it waits")
    run.site("job", "stop", run.name)
    assert run.until_stopped()["attempt"] == 0
    assert run.slurm_state == "CANCELLED"
    assert read_json(run.folder / "started.json")["attempt"] == 0


def test_a_job_requeued_by_hand_saves_its_state_and_goes_on(disturbed: Disturbed, ordered: dict[str, Run]) -> None:
    run = ordered["requeued"]
    view = run.until_completed()
    assert (view["attempt"], run.slurm_state) == (1, "COMPLETED")
    assert re.search(r"leaving after step (\d+), to go on after step \1\n", run.log)
    assert went_on(run)
    assert run.losses == disturbed.whole.losses


def test_a_job_that_does_not_leave_in_its_time_is_killed(ordered: dict[str, Run]) -> None:
    run = ordered["hung"]
    run.until_stopped()
    asked, ended = (
        datetime.fromisoformat(event["at"])
        for event in run.site.json("job", "events", run.name)
        if event["to"] in ("stopping", "stopped")
    )
    assert (ended - asked).total_seconds() >= STOP_TIMEOUT
    assert run.slurm_state == "CANCELLED"


def test_a_preempted_job_saves_its_state_and_goes_on(disturbed: Disturbed) -> None:
    run = disturbed.preempted
    view = run.until_completed()
    assert (view["attempt"], run.slurm_state) == (1, "COMPLETED")
    assert re.search(r"leaving after step (\d+), to go on after step \1\n", run.log)
    assert went_on(run)
    assert run.losses == pytest.approx(disturbed.whole.losses, rel=1e-4)  # the sum of two processes


def test_a_job_whose_node_dies_goes_on_from_its_state_on_another_one(disturbed: Disturbed) -> None:
    run = disturbed.moved
    view = run.until_completed()
    assert read_json(run.folder / "started.json")["node"] != disturbed.node
    assert (view["attempt"], run.slurm_state) == (1, "COMPLETED")
    assert went_on(run)
    assert first_step_of(run, 1) > 1
    assert run.losses == disturbed.whole.losses


def went_on_importing(site: Site, imported: str) -> bool:
    """Wait for the end: it is ready, and was submitted once more."""

    def view() -> dict[str, Any]:
        return site.json("dataset", "show", imported)

    wait_until(lambda: view()["status"] != "assembling", "the import ends")
    assert (view()["status"], view()["row_count"], view()["error"]) == ("ready", 100, None)
    events = site.json("dataset", "events", imported)
    return [event["change"] for event in events].count("resumed") == 1


def test_an_import_whose_node_dies_goes_on_on_another_one(site: Site, disturbed: Disturbed) -> None:
    assert went_on_importing(site, disturbed.imported)
    assert read_json(site.root / "imports" / disturbed.imported / "started.json")["node"] != disturbed.node


def test_an_import_whose_script_is_killed_goes_on(site: Site) -> None:
    server = StalledServer()
    imported = site.json("dataset", "import", "killed", server.url, "--format", "conversational")["id"]
    assert server.stalls.wait(60)
    os.kill(read_json(site.root / "imports" / imported / "started.json")["pid"], signal.SIGKILL)
    server.released.set()
    assert went_on_importing(site, imported)
    server.shutdown()
    server.server_close()


def test_at_its_walltime_a_job_leaves_in_time_and_goes_on(disturbed: Disturbed) -> None:
    run = disturbed.minute
    first = run.view["slurm_job_id"]
    view = run.until_completed(timeout=900)
    assert (view["attempt"] >= 1, run.slurm_state) == (True, "COMPLETED")
    states = slurm("sacct", "-X", "-D", "--noheader", "--format=State", f"--jobs={first}").split()
    assert states[0] == "REQUEUED"
    log = (run.folder / "logs" / "attempt-0.log").read_text()
    assert "asked to leave" in log
    assert "to be started again" in log
    if view["slurm_job_id"] == first:  # on a busy machine a start may take the whole minute: then sync submits it anew
        assert states == ["REQUEUED"] * view["attempt"] + ["COMPLETED"]
    assert went_on(run)
    assert run.losses == disturbed.whole.losses


KILLER = """#!/bin/bash
real={real}
[[ "$*" == *--test-only* || -e {killed} ]] && exec $real "$@"
[[ {moment} == before ]] || $real "$@" >/dev/null
{devcluster} kill slurmctld
touch {killed}
[[ {moment} == after ]] || exec $real "$@"
echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)" >&2
exit 1
"""


def submit_while_the_controller_dies(site: Site, moment: str, folder: Path) -> Run:
    """slurmctld is killed right before, or right after it has taken the job, whose answer is lost."""
    folder.mkdir()
    killed, wrapper = folder / "killed", folder / "sbatch"
    tool = TOP / "scripts" / "devcluster"
    wrapper.write_text(KILLER.format(real=shutil.which("sbatch"), killed=killed, moment=moment, devcluster=tool))
    wrapper.chmod(0o755)
    creating = site.start(*words(moment, "quick"), PATH=f"{folder}:{os.environ['PATH']}")
    wait_until(killed.exists, "slurmctld is killed")
    devcluster("start", "slurmctld")
    said = creating.communicate(timeout=120)
    assert creating.returncode in (0, 7), said
    return Run.of(site, site.json("job", "show", moment))


def test_a_job_whose_submission_the_controller_did_not_survive_is_neither_lost_nor_doubled(
    site: Site, disturbed: Disturbed, tmp_path: Path
) -> None:
    runs = [submit_while_the_controller_dies(site, moment, tmp_path / moment) for moment in ("before", "after")]
    for run in runs:
        run.until_completed()
        assert run.slurm_state == "COMPLETED"
        assert run.losses == disturbed.whole.losses


def test_without_slurmdbd_a_job_ends_right_and_what_it_used_comes_later(site: Site, disturbed: Disturbed) -> None:
    devcluster("stop", "slurmdbd")
    try:
        run = Run.start(site, "unaccounted", "quick")
        run.until_completed()
        assert run.view["usage"] is None
        assert run.losses == disturbed.whole.losses
    finally:
        devcluster("start", "slurmdbd")
    assert run.usage()["runs"] == 1
    assert run.slurm_state == "COMPLETED"


@pytest.fixture
def no_accounting(cluster: None) -> Iterator[None]:
    """A controller that keeps no accounts."""
    path = Path(os.environ["TFSLURM_DEVCLUSTER"]) / "etc" / "slurm.conf"
    before = path.read_text()
    other = re.sub(r"^Accounting.*\n", "", before, flags=re.MULTILINE)
    path.write_text(other + "AccountingStorageType=accounting_storage/none\n")
    devcluster("stop", "slurmctld")
    devcluster("start", "slurmctld")
    yield
    path.write_text(before)
    devcluster("stop", "slurmctld")
    devcluster("start", "slurmctld")


def test_on_a_cluster_without_accounting_jobs_end_right(site: Site, disturbed: Disturbed, no_accounting: None) -> None:
    trained, cancelled = Run.start(site, "accountless", "quick"), Run.start(site, "abandoned")
    cancelled.until_saved()
    slurm("scancel", cancelled.view["slurm_job_id"])
    cancelled.until_stopped()
    assert trained.until_completed()["usage"] is None
    assert trained.losses == disturbed.whole.losses
