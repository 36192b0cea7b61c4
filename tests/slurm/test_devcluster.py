"""The dev cluster, on a cluster of these tests' own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "devcluster"
MISSING = [
    command
    for command in ("slurmctld", "slurmdbd", "slurmd", "munged", "mariadbd")
    if not shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {' '.join(MISSING)} (scripts/devcluster install)"
)


def free_base_port():
    """A base port whose six ports are free, away from the default."""
    for base in range(29000, 31000, 20):
        try:
            for offset in (0, 1, 11, 12, 13, 14):
                with socket.socket() as probe:
                    probe.bind(("", base + offset))
            return base
        except OSError:
            continue
    raise AssertionError("no free ports from 29000 to 31000")


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        self.base_port = free_base_port()
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}

    def __call__(self, *words, port=True):
        options = ["--base-port", str(self.base_port)] if port else []
        return subprocess.run(
            [SCRIPT, "--dir", self.folder, *options, *words],
            env=self.environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def status(self):
        return json.loads(self("status", "--json").stdout)

    def pids(self):
        return {daemon["name"]: daemon["pid"] for daemon in self.status()["daemons"]}

    def run(self, *command, check=True):
        environ = {**self.environ, "SLURM_CONF": f"{self.folder}/etc/slurm.conf"}
        return subprocess.run(
            command, env=environ, cwd=self.folder, check=check, capture_output=True, text=True, timeout=60
        )

    def sbatch(self, script, *options):
        out = self.run("sbatch", "--parsable", "--output=%j.out", *options, "--wrap", script)
        return out.stdout.strip()

    def wait(self, job, *states):
        return until(lambda: self.accounted(job) in states and self.accounted(job))

    def accounted(self, job):
        return self.run("sacct", "-Xn", "-j", job, "-o", "state%20").stdout.strip()

    def output(self, job):
        return (self.folder / f"{job}.out").read_text()


def until(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def processes_of(folder):
    """Everything alive that has to do with the cluster in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text and process.name != str(os.getpid()):
            found.append((process.name, text.replace(b"\0", b" ")[:200]))
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("devcluster") / "c")
    up = cluster("up")
    try:
        assert up.returncode == 0, up.stderr
        yield cluster
    finally:
        cluster("down", "--purge")


@needs_slurm
def test_up_again_starts_nothing_and_prints_how_to_connect(cluster):
    before = cluster.pids()
    up = cluster("up", port=False)
    assert up.returncode == 0, up.stderr
    assert "up already" in up.stderr
    assert up.stdout == cluster("env").stdout
    assert f"SLURM_CONF={cluster.folder}/etc/slurm.conf" in up.stdout
    assert cluster.pids() == before


@needs_slurm
def test_status_tells_daemons_nodes_partitions_and_the_reservation(cluster):
    status = cluster.status()
    assert status["up"] is True
    assert status["base_port"] == cluster.base_port
    assert {daemon["state"] for daemon in status["daemons"]} == {"up"}
    assert [node["name"] for node in status["nodes"]] == ["n1", "n2", "n3", "n4"]
    assert {node["gres"] for node in status["nodes"]} == {"gpu:8"}
    assert [p["name"] for p in status["partitions"]] == ["cpu", "gpu", "scavenge", "short", "urgent"]
    assert status["reservation"]["nodes"] == "n4"
    table = cluster("status")
    assert table.returncode == 0
    assert re.search(r"^slurmdbd +up +\d+", table.stdout, re.M)


@needs_slurm
def test_a_job_on_two_nodes_gets_its_gpus_and_is_accounted(cluster):
    script = "srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = cluster.sbatch(script, "--nodes=2", "--gpus-per-node=2", "--comment=uuid-1")
    cluster.wait(job, "COMPLETED")
    assert sorted(cluster.output(job).splitlines()) == ["n1 0,1", "n2 0,1"]
    row = cluster.run("sacct", "-XnP", "-j", job, "-o", "account,comment,alloctres").stdout.strip()
    assert row.startswith("research|uuid-1|")
    assert "gres/gpu=4" in row


@needs_slurm
def test_only_the_reservations_jobs_run_on_the_reserved_node(cluster):
    other = cluster.sbatch("hostname", "--nodelist=n4")
    job = cluster.sbatch("echo $SLURMD_NODENAME", "--reservation=serving")
    cluster.wait(job, "COMPLETED")
    assert cluster.output(job) == "n4\n"
    assert cluster.run("squeue", "-h", "-j", other, "-o", "%T").stdout == "PENDING\n"
    cluster.run("scancel", other)


@needs_slurm
def test_limits_are_enforced(cluster):
    jobs = [cluster.sbatch("true", "--hold", "--qos=limited") for _ in range(2)]
    third = cluster.run("sbatch", "--qos=limited", "--output=/dev/null", "--wrap", "true", check=False)
    assert third.returncode != 0
    assert "QOSMaxSubmitJobPerUserLimit" in third.stderr
    cluster.run("scancel", *jobs)


@needs_slurm
def test_nothing_that_a_job_left_behind_survives_it(cluster):
    job = cluster.sbatch("setsid sleep 300 & echo $! >&2; (setsid nohup sleep 300 &); sleep 0.2")
    cluster.wait(job, "COMPLETED")
    stray = Path("/proc", cluster.output(job).split()[0], "cmdline")
    until(lambda: not stray.exists() or not stray.read_bytes())


@needs_slurm
def test_up_brings_back_what_was_killed_and_leaves_the_rest_alone(cluster):
    before = cluster.pids()
    for daemon in ("slurmctld", "munged"):
        os.kill(before[daemon], signal.SIGKILL)
    assert cluster("kill", "n2").returncode == 0
    status = cluster("status")
    assert status.returncode == 3
    assert "NOT fully up" in status.stdout
    up = cluster("up")
    assert up.returncode == 0, up.stderr
    after = cluster.pids()
    assert {name for name in after if after[name] != before[name]} == {"slurmctld", "munged", "n2"}
    assert cluster.status()["up"] is True


@needs_slurm
def test_a_daemon_can_be_stopped_and_started_alone(cluster):
    assert cluster("stop", "slurmdbd").returncode == 0
    assert cluster.run("sacct", check=False).returncode != 0
    assert cluster("start", "slurmdbd").returncode == 0
    assert cluster.run("sacct").returncode == 0


@needs_slurm
def test_a_port_in_use_is_refused(cluster, tmp_path):
    second = Cluster(tmp_path / "c")
    second.base_port = cluster.base_port
    up = second("up")
    assert up.returncode == 1
    assert f"port {cluster.base_port} is in use" in up.stderr
    assert processes_of(second.folder) == []


@needs_slurm
def test_down_leaves_no_process_and_the_next_up_has_the_history(cluster):
    job = cluster.sbatch("trap '' TERM; srun sleep 300 & (setsid sleep 300 &); wait; sleep 300", "--nodes=2")
    cluster.wait(job, "RUNNING")
    down = cluster("down")
    assert down.returncode == 0, down.stderr
    assert processes_of(cluster.folder) == []
    assert cluster("status").returncode == 3
    assert cluster("down").returncode == 0
    assert cluster("up").returncode == 0
    assert cluster.accounted(job).startswith("CANCELLED")


@needs_slurm
def test_purge_removes_the_folder(cluster):
    assert cluster("down", "--purge").returncode == 0
    assert not cluster.folder.exists()
    assert processes_of(cluster.folder) == []


def test_a_folder_with_something_else_in_it_is_never_touched(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "slurm.conf").write_text("ClusterName=production\n")
    (tmp_path / "mine").write_text("precious")
    for words in (["up"], ["down", "--purge"], ["stop", "n1"]):
        done = Cluster(tmp_path)(*words)
        assert done.returncode == 1, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["etc", "mine"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which command?"),
        (["frob"], "no such command: frob"),
        (["up", "--frob"], "no such option: --frob"),
        (["stop", "n9"], "stop needs one of"),
        (["up", "--base-port", "x"], "--base-port 'x' is not a number"),
        (["up", "--dir", "/tmp/a b"], "choose another --dir"),
        (["up", "--dir"], "--dir needs a value"),
    ],
)
def test_misuse_is_said_and_starts_nothing(tmp_path, words, message):
    done = Cluster(tmp_path / "c")(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "c").exists()


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool))
    copy = tmp_path / "devcluster"
    copy.write_text(re.sub(r"(?m)^export PATH=.*", f"PATH={tools}", SCRIPT.read_text()))
    done = subprocess.run(["bash", copy, "--dir", tmp_path / "c", "up"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "apt-get install" in done.stderr
    assert "slurm-wlm slurmdbd munge mariadb-server" in done.stderr


def test_help_has_examples_and_exit_codes():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "Examples:" in done.stdout
    assert "Exit codes:" in done.stdout


def test_the_scripts_are_clean_for_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("not installed: shellcheck")
    done = subprocess.run(
        ["shellcheck", SCRIPT, SCRIPT.parent / "devcluster.d" / "epilog"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
