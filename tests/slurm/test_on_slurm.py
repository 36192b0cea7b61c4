"""Scripts, client and observations on a real Slurm; a shell script stands in for the trainer."""

import getpass
import os
import shlex
import subprocess
import time
import uuid
from datetime import timedelta

import pytest
import yaml

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Submission, now
from tfslurm.files import read_json, write_atomic
from tfslurm.slurm import periodic, submissions
from tfslurm.slurm.client import Slurm, SlurmRefused
from tfslurm.slurm.observe import observe
from tfslurm.slurm.states import Fate
from tfslurm.slurm.usage import usage

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        "TFSLURM_DEVCLUSTER" not in os.environ,
        reason='no dev cluster: eval "$(scripts/devcluster up)" first, or run scripts/test',
    ),
]

LONG_AGO = now() - timedelta(hours=1)

WAIT = 200.0
"""Seconds: a requeued job waits for as long as a credential lives."""


class Site:
    """An installation whose instance `small` is on Slurm, and whose training program is a shell script."""

    def __init__(self, installation, program):
        self.installation, self.program, self.slurm = installation, program, Slurm(20)
        self.names = []

    def configure(self, body, **instance):
        """`body` is the trainer; prepare does nothing."""
        text = f"[[ $2 == *prepare ]] && exit 0\nfolder=$3\n{body}"
        python = str(self.program("trainer", text))
        self.installation.configure(environments={"train": python, "core": "/bin/true"})
        small = {"time": 5, "memory": "100M", **instance}
        path = self.installation.folder / "instances.yaml"
        path.write_text(yaml.safe_dump({"instances": {"small": small}}))
        self.installation.configure()
        return self.settings.instance("small", "training")

    @property
    def settings(self):
        return self.installation.settings

    def prepare(self, size, **fields):
        """A job's folder and row, not handed over yet."""
        object_id = f"job-{uuid.uuid4().hex[:16]}"
        paths = self.settings.root.job(object_id)
        paths.logs.mkdir(parents=True)
        name, text = submissions.script_for(
            self.settings, "train", size, paths, "job", object_id,
            first_attempt=fields.get("attempt", 0), exclude=fields.get("exclude", ()),
        )  # fmt: skip
        write_atomic(paths.script, text, mode=0o555)
        with write_transaction():
            row = submissions.record(name, size, "job", object_id, **fields)
        self.names.append(name)
        return row, paths

    def submit(self, size, **fields):
        row, paths = self.prepare(size, **fields)
        submissions.hand_over(self.settings, row, paths.script, pytest.fail)
        return row, paths

    def array(self, size, count, max_parallel):
        tasks = [(str(uuid.uuid4()), f"job-{uuid.uuid4().hex[:16]}") for _ in range(count)]
        name, text = submissions.array_script_for(self.settings, size, "sweep", "sw-1", count, max_parallel)
        paths = self.settings.root.array(name)
        submissions.write_array(paths, text, ((own, self.settings.root.job(i).folder) for own, i in tasks))
        for _, object_id in tasks:
            self.settings.root.job(object_id).logs.mkdir(parents=True)
        with write_transaction():
            rows = submissions.record_array(name, size, "job", tasks)
        self.names.append(name)
        return rows, paths

    def see(self, row):
        return observe(self.settings, [row], self.slurm)[row.uuid]


@pytest.fixture
def site(installation, program):
    made = Site(installation, program)
    yield made
    for name in made.names:
        made.slurm.cancel_named(name)


@pytest.fixture
def eventually(until):
    return lambda met: until(met, WAIT)


def test_a_job_runs_once_and_is_seen_from_its_start_to_its_end(site, eventually):
    # Accounting counts whole seconds.
    body = "touch $folder/running; sleep 1.5; until [[ -e $folder/go ]]; do sleep 0.1; done"
    row, paths = site.submit(site.configure(body))
    eventually((paths.folder / "running").exists)
    seen = site.see(row)
    assert (seen.fate, seen.state, seen.queued, seen.restarts) == (Fate.ACTIVE, "RUNNING", True, 0)
    assert seen.nodes == read_json(paths.started)["node"]
    assert paths.claim(row.uuid).read_text() == f"{row.job_id}\n"
    (paths.folder / "go").touch()
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, site.see(row).exit_code) == (Fate.COMPLETED, 0)
    found = eventually(lambda: usage(site.slurm, [row.job_id], row.created_at - timedelta(minutes=1)))
    assert (found[row.job_id].runs, found[row.job_id].nodes) == (1, [seen.nodes])
    assert found[row.job_id].cpu_hours > 0


def test_an_array_is_one_sbatch_whose_tasks_find_their_own_folders(site, eventually):
    body = "echo $SLURM_ARRAY_TASK_ID >$folder/task; [[ $SLURM_ARRAY_TASK_ID != 2 ]]"
    rows, paths = site.array(site.configure(body), 4, 3)
    submissions.hand_over_array(site.settings, rows, paths.script, pytest.fail)
    assert len({row.job_id.partition("_")[0] for row in rows}) == 1
    assert [row.job_id.partition("_")[2] for row in rows] == ["0", "1", "2", "3"]
    kept = list(Submission.select().where(Submission.name == rows[0].name).order_by(Submission.array_index))
    assert [(row.state, row.job_id) for row in kept] == [("submitted", row.job_id) for row in rows]
    eventually(lambda: all(seen.ended for seen in observe(site.settings, kept, site.slurm).values()))
    seen = observe(site.settings, kept, site.slurm)
    assert [seen[row.uuid].fate for row in rows] == [Fate.COMPLETED] * 2 + [Fate.FAILED, Fate.COMPLETED]
    folders = [site.settings.root.job(row.object_id) for row in rows]
    assert [(folder.folder / "task").read_text() for folder in folders] == ["0\n", "1\n", "2\n", "3\n"]
    assert [read_json(folder.exit)["uuid"] for folder in folders] == [row.uuid for row in rows]
    assert {read_json(folder.started)["slurm_job_id"] for folder in folders} == {site.slurm.find(rows[0].name)[0]}
    assert eventually(lambda: len(site.slurm.accounting([row.job_id for row in rows], rows[0].created_at)) == 4)


def test_of_two_jobs_of_one_submission_one_runs(site, eventually):
    row, paths = site.prepare(site.configure("echo ran >>$folder/ran; sleep 3"))
    ids = [site.slurm.run("sbatch", "--parsable", str(paths.script)).strip() for _ in range(2)]
    assert site.slurm.find(row.name) == sorted(ids, key=int)
    eventually(lambda: all(entry.state == "COMPLETED" for entry in site.slurm.queue(ids).values()))
    assert (paths.folder / "ran").read_text() == "ran\n"
    owner = paths.claim(row.uuid).read_text().strip()
    assert read_json(paths.started)["slurm_job_id"] == owner
    log = (paths.logs / "slurm.log").read_text()
    (other,) = set(ids) - {owner}
    assert f"job {other} leaves: {row.uuid} runs as job {owner}" in log
    # Where the other one was noted, the one that runs is seen all the same.
    row.state, row.job_id, row.submitted_at = "submitted", other, now()
    assert site.see(row).job_id == owner


# What the trainer does that saves its state when it is asked to leave, or to end.
LEAVING = """
trap 'exit 75' TERM
echo $TFSLURM_ATTEMPT >>$folder/attempts
if [[ $TFSLURM_ATTEMPT != 0 ]]; then exit 0; fi
touch $folder/running
until [[ -e $folder/leave ]]; do sleep 0.2 & wait $!; done
echo '{"result": "suspended", "step": 3, "steps_made": 3}' >$folder/outcome.json
exit 75
"""


def test_before_the_walltime_a_job_leaves_and_slurm_starts_it_again(site, eventually):
    row, paths = site.submit(site.configure(LEAVING, time=1))
    eventually(lambda: paths.log(0).exists() and "to be started again" in paths.log(0).read_text())
    record = read_json(paths.exit)
    assert record is None or (record["attempt"], record["exit_code"]) == (0, 75)
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, read_json(paths.exit)["attempt"]) == (Fate.COMPLETED, 1)
    assert (paths.folder / "attempts").read_text() == "0\n1\n"
    assert not paths.leave.exists()


def test_a_preempted_job_saves_its_state_and_comes_back(site, eventually):
    size = site.configure(LEAVING, partition="scavenge", options={"nodelist": "n3", "exclusive": True})
    row, paths = site.submit(size)
    eventually((paths.folder / "running").exists)
    name = f"--job-name={row.name}-urgent"
    site.names.append(f"{row.name}-urgent")
    site.slurm.run(
        "sbatch", name, "--partition=urgent", "--nodelist=n3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    )
    seen = eventually(lambda: site.see(row).fate is Fate.WAITING and site.see(row))
    assert (seen.restarts, seen.ended) == (1, False)
    assert (read_json(paths.exit)["attempt"], read_json(paths.exit)["exit_code"]) == (0, 75)
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, (paths.folder / "attempts").read_text()) == (Fate.COMPLETED, "0\n1\n")
    assert paths.log(0).exists() and paths.log(1).exists()
    used = eventually(
        lambda: (all_ := usage(site.slurm, [row.job_id], LONG_AGO)) and all_[row.job_id].runs == 2 and all_[row.job_id]
    )
    assert used.elapsed_seconds >= 1
    assert used.queue_wait_seconds >= 1


def test_what_is_cancelled_does_not_come_back(site, eventually):
    row, paths = site.submit(site.configure(LEAVING))
    eventually((paths.folder / "running").exists)
    site.slurm.cancel(row.job_id)
    eventually(lambda: site.see(row).ended)
    time.sleep(1)
    assert site.see(row).fate is Fate.CANCELLED
    assert read_json(paths.exit)["exit_code"] == 75
    assert (paths.folder / "attempts").read_text() == "0\n"


def test_on_two_nodes_all_ranks_know_the_same_master_and_the_first_ones_code_counts(site, eventually):
    body = """
    echo "$MASTER_ADDR:$MASTER_PORT" >$folder/master.$SLURM_PROCID
    echo $SLURMD_NODENAME >$folder/node.$SLURM_PROCID
    [[ $SLURM_PROCID == 0 ]] || exit 0
    sleep 1; exit 76
    """
    row, paths = site.submit(site.configure(body, nodes=2, processes_per_node=2))
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, site.see(row).exit_code) == (Fate.FAILED, 76)
    masters = [(paths.folder / f"master.{rank}").read_text() for rank in range(4)]
    assert len(set(masters)) == 1
    nodes = [(paths.folder / f"node.{rank}").read_text().strip() for rank in range(4)]
    assert nodes[0] == nodes[1] == read_json(paths.started)["node"] != nodes[2] == nodes[3]
    assert site.see(row).nodes == f"n[{nodes[0][1:]}-{nodes[2][1:]}]"


def test_a_trainer_that_made_no_steps_is_not_started_again(site, eventually):
    row, paths = site.submit(site.configure("exit 76"))
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, site.see(row).exit_code) == (Fate.FAILED, 76)


def test_where_slurm_may_not_start_it_again_it_ends_with_75(site, eventually):
    size = site.configure("exit 75")
    site.installation.configure(slurm={"requeue": False})
    row, paths = site.submit(size)
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, site.see(row).exit_code) == (Fate.FAILED, 75)
    with pytest.raises(SlurmRefused):
        site.slurm.requeue(row.job_id)


def test_tasks_of_an_array_are_started_again_alone_by_themselves_and_by_hand(site, eventually):
    body = """
    echo $TFSLURM_ATTEMPT >>$folder/ran
    case $SLURM_ARRAY_TASK_ID.$TFSLURM_ATTEMPT in 1.0) exit 75 ;; 2.0) sleep 60 ;; esac
    """
    rows, paths = site.array(site.configure(body), 3, None)
    submissions.hand_over_array(site.settings, rows, paths.script, pytest.fail)
    folders = [site.settings.root.job(row.object_id).folder for row in rows]
    eventually(lambda: all((folder / "ran").exists() for folder in folders))
    site.slurm.requeue(rows[2].job_id)
    eventually(lambda: all(seen.ended for seen in observe(site.settings, rows, site.slurm).values()))
    assert {seen.fate for seen in observe(site.settings, rows, site.slurm).values()} == {Fate.COMPLETED}
    assert [(folder / "ran").read_text() for folder in folders] == ["0\n", "0\n1\n", "0\n1\n"]
    assert [site.see(row).restarts for row in rows] == [0, 1, 1]


def test_a_finished_job_that_is_started_again_ends_at_once_and_keeps_its_outcome(site, eventually):
    row, paths = site.prepare(site.configure("touch $folder/trained"), attempt=3)
    outcome = '{\n  "result": "succeeded",\n  "steps": 3\n}\n'
    paths.outcome.write_text(outcome)
    submissions.hand_over(site.settings, row, paths.script, pytest.fail)
    eventually(lambda: site.see(row).ended)
    assert (site.see(row).fate, read_json(paths.exit)["attempt"]) == (Fate.COMPLETED, 3)
    assert paths.outcome.read_text() == outcome
    assert not (paths.folder / "trained").exists()
    assert paths.log(3).exists()


def test_excluded_nodes_are_not_given(site, eventually):
    row, paths = site.submit(site.configure("exit 0", options={"exclude": "n1"}), exclude=("n2", "n4"))
    eventually(lambda: site.see(row).ended)
    assert read_json(paths.started)["node"] == "n3"


def test_a_waiting_job_tells_what_it_waits_for(site, eventually):
    row, _ = site.submit(site.configure("exit 0", options={"nodelist": "n4"}))
    seen = eventually(lambda: site.see(row).reason and site.see(row))
    assert (seen.fate, seen.state) == (Fate.WAITING, "PENDING")
    held, _ = site.prepare(site.configure("exit 0"))
    held.job_id = site.slurm.run(
        "sbatch", "--parsable", "--hold", f"--job-name={held.name}", "--output=/dev/null", "--wrap", "true"
    ).strip()
    held.state, held.submitted_at = "submitted", now()
    seen = site.see(held)
    assert (seen.fate, seen.reason.partition(":")[0]) == (Fate.HELD, "JobHeldUser")
    assert f"scontrol release {held.job_id}" in seen.reason
    row, paths = site.submit(site.configure("touch $folder/running; sleep 60"))
    eventually((paths.folder / "running").exists)
    site.slurm.run("scontrol", "requeuehold", row.job_id)
    seen = eventually(lambda: site.see(row).fate is Fate.HELD and site.see(row))
    assert f"it was started again and is held; `scontrol release {row.job_id}`" in seen.reason


def test_what_depends_on_a_failure_is_told_to_wait_for_ever(site, eventually):
    row, _ = site.prepare(site.configure("exit 0"))
    first = site.slurm.run(
        "sbatch", "--parsable", f"--job-name={row.name}", "--output=/dev/null", "--wrap", "exit 1"
    ).strip()
    options = [
        "--parsable",
        f"--job-name={row.name}",
        f"--dependency=afterok:{first}",
        "--output=/dev/null",
        "--wrap",
        "true",
    ]
    row.job_id = site.slurm.run("sbatch", *options).strip()
    row.state, row.submitted_at = "submitted", now()
    seen = eventually(lambda: site.see(row).fate is Fate.HELD and site.see(row))
    assert seen.reason.startswith("DependencyNeverSatisfied: what it depends on has failed")


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ({"account": "nobody"}, "Invalid account"),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"qos": "nothing"}, "Invalid qos"),
        ({"reservation": "none"}, "reservation is invalid"),
        ({"memory": "999G"}, "Requested node configuration is not available"),
        ({"constraint": "unknown"}, "Invalid feature"),
        ({"partition": "short", "time": "00:06:00"}, "PartitionTimeLimit: a time of 00:06:00 is more"),
        ({"time": "1-00:00:01"}, r"default \(1-00:00:00\)"),
        ({"partition": "short", "time": 5}, None),
    ],
)
def test_the_sites_limits_are_told_before_anything_is_queued(site, instance, said):
    _, paths = site.prepare(site.configure("exit 0", **instance))
    if said is None:
        assert "to start at" in site.slurm.test(paths.script)
        return
    with pytest.raises(SlurmRefused, match=said):
        site.slurm.test(paths.script)


def test_a_reservation_that_ends_too_early_is_told(site):
    name = f"r{uuid.uuid4().hex[:8]}"
    options = ["StartTime=now", "Duration=00:10:00", "Nodes=n3", f"Users={getpass.getuser()}", "Flags=IGNORE_JOBS"]
    site.slurm.run("scontrol", "create", "reservation", f"ReservationName={name}", *options)
    try:
        _, paths = site.prepare(site.configure("exit 0", reservation=name, time=60))
        assert f"; reservation {name} ends at 20" in site.slurm.test(paths.script)
        _, paths = site.prepare(site.configure("exit 0", reservation=name, time=5))
        assert "ends at" not in site.slurm.test(paths.script)
    finally:
        site.slurm.run("scontrol", "delete", "reservation", name)


def test_an_array_beyond_the_controllers_limit_is_refused_before_it_is_queued(site):
    size = site.slurm.limits().max_array_size
    for count, good in ((size, True), (size + 1, False)):
        _, paths = site.array(site.configure("exit 0"), count, 1)
        if good:
            assert "to start at" in site.slurm.test(paths.script)
        else:
            with pytest.raises(SlurmRefused, match="Invalid job array"):
                site.slurm.test(paths.script)


def test_a_qos_that_is_full_is_told_before_anything_is_queued(site):
    _, paths = site.prepare(site.configure("exit 0", qos="limited"))
    held = [
        site.slurm.run(
            "sbatch", "--parsable", "--hold", "--qos=limited", "--output=/dev/null", "--wrap", "true"
        ).strip()
        for _ in range(2)
    ]
    try:
        with pytest.raises(SlurmRefused, match="QOSMaxSubmitJobPerUserLimit"):
            site.slurm.test(paths.script)
    finally:
        site.slurm.cancel(*held)


def test_a_periodic_sync_queues_its_successor_once_and_ends_when_told(site, eventually):
    site.configure("exit 0")
    core = site.program("core python", f'echo "$@" >>{shlex.quote(str(site.installation.folder))}/synced')
    site.installation.configure(environments={"core": str(core)})
    made = periodic.plan(site.settings, minutes=1, instance="small")
    site.names.append(made.name)
    first = periodic.start(site.settings, made)
    eventually((site.installation.folder / "synced").exists)
    assert (site.installation.folder / "synced").read_text() == "-m tfslurm sync --quiet\n"
    (successor,) = eventually(lambda: [i for i in periodic.queued(site.settings) if i != first])
    entry = site.slurm.queue([successor])[successor]
    assert (entry.state, entry.reason) in {("PENDING", "BeginTime"), ("PENDING", "Dependency")}
    assert (made.folder / "logs" / "slurm.log").exists()
    assert successor in periodic.stop(site.settings)
    eventually(lambda: not periodic.queued(site.settings))


def test_no_job_is_lost_or_doubled_by_an_sbatch_that_answers_late_twice_or_not_at_all(site, monkeypatch, eventually):
    size = site.configure("echo ran >>$folder/ran")
    site.installation.configure(slurm={"command_timeout": 2.0})
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    wrapper = site.program(
        "sbatch",
        f"""
        mode=$(head -n 1 "$MODES"); sed -i 1d "$MODES"
        case $mode in
          late) {real} "$@"; exec sleep 5 ;;
          error) {real} "$@" >/dev/null; echo "Socket timed out on send/recv operation" >&2; exit 1 ;;
          refused) echo "Unable to contact slurm controller (connect failure)" >&2; exit 1 ;;
          twice) {real} "$@" >/dev/null; {real} "$@" ;;
          *) {real} "$@" ;;
        esac
        """,
    )
    modes = site.installation.folder / "modes"
    monkeypatch.setenv("MODES", str(modes))
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    submitted = []
    for mode in ("late", "error", "refused", "refused\nerror", "twice", "twice", "fine"):
        modes.write_text(mode + "\n")
        submitted.append((mode, *site.submit(size)))
    for mode, row, _ in submitted:
        assert row.job_id in site.slurm.find(row.name)
        assert len(site.slurm.find(row.name)) == (2 if mode == "twice" else 1)
    for _, row, paths in submitted:
        eventually(
            lambda row=row: all(e.state == "COMPLETED" for e in site.slurm.queue(site.slurm.find(row.name)).values())
        )
        assert (paths.folder / "ran").read_text() == "ran\n"


def test_sbatchs_own_variables_do_not_change_what_a_script_asks_for(site, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    row, _ = site.submit(site.configure("exit 0", options={"nodelist": "n4"}))
    assert site.see(row).state in ("PENDING", "RUNNING", "COMPLETED")


def test_the_commands_environment_is_left_as_it_was():
    assert subprocess.run(["bash", "-c", "echo ${SLURM_TIME_FORMAT:-unset}"], capture_output=True).stdout == b"unset\n"
