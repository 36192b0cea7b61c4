"""The rendered script, run for real; a shell script stands in for the interpreter of the node."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tfslurm.files import read_json
from tfslurm.paths import RunPaths
from tfslurm.settings import Instance, Prologue
from tfslurm.slurm.templates import Array, Script, render


@pytest.fixture
def run(tmp_path, program):
    """Start the script of a template with `body` as its Python; the process and its folder."""
    started = []

    def run(body, template="serve", environment=None, **fields):
        folder = tmp_path / "some runs" / "one"
        folder.mkdir(parents=True, exist_ok=True)
        script = Script(
            template=template,
            uuid="u-1",
            kind="job",
            object_id="job-1",
            folder=folder,
            instance=Instance(name="local", launcher="local", processes_per_node=2),
            python=str(program("python", body)),
            core_python=str(program("core python", f'echo "$@" >>{shlex.quote(str(folder))}/synced')),
            root=tmp_path / "some root",
        )
        (folder / "script.sh").write_text(render(replace(script, **fields)))
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | (environment or {})
        process = subprocess.Popen(["bash", folder / "script.sh"], env=environ, start_new_session=True)
        started.append(process)
        return process, RunPaths(folder)

    yield run
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def test_a_run_leaves_its_start_its_end_and_its_log_and_syncs(run):
    process, paths = run('echo "doing $*"; echo complaint >&2; exit 3')
    assert process.wait(20) == 3
    started, ended = read_json(paths.started), read_json(paths.exit)
    node = os.uname().nodename
    assert {key: started[key] for key in ("uuid", "slurm_job_id", "attempt", "node", "address", "pid")} == {
        "uuid": "u-1", "slurm_job_id": "", "attempt": 0, "node": node, "address": "127.0.0.1", "pid": process.pid,
    }  # fmt: skip
    assert (ended["uuid"], ended["attempt"], ended["exit_code"]) == ("u-1", 0, 3)
    log = paths.log(0).read_text()
    assert f"doing -m tfslurm.serving.supervisor {paths.folder}" in log
    assert "complaint" in log
    assert (paths.folder / "synced").read_text() == "-m tfslurm sync --quiet\n"
    assert sorted(path.name for path in paths.folder.iterdir()) == [
        "exit.json", "logs", "script.sh", "started.json", "synced"
    ]  # fmt: skip


def test_the_start_is_recorded_with_the_ticks_that_name_the_process(run, until):
    from tfslurm.process import alive, handle

    process, paths = run("sleep 30")
    started = until(lambda: read_json(paths.started))
    assert f"{started['pid']}:{started['ticks']}" == handle(process.pid)
    assert alive(handle(process.pid))


def test_a_sync_that_fails_does_not_change_the_exit_code(run, program):
    process, paths = run("exit 0", core_python="/nowhere/python")
    assert process.wait(20) == 0
    assert read_json(paths.exit)["exit_code"] == 0


def test_a_missing_interpreter_is_exit_code_127_and_said_in_the_log(run):
    process, paths = run("", python="/nowhere/python")
    assert process.wait(20) == 127
    assert read_json(paths.exit)["exit_code"] == 127
    assert "/nowhere/python" in paths.log(0).read_text()


def test_a_missing_interpreter_of_the_trainers_is_exit_code_127_too(run):
    process, paths = run('[[ $2 == *prepare ]] && rm "$0"', template="train")
    assert process.wait(20) == 127


def test_a_term_is_forwarded_and_the_programs_own_exit_code_kept(run, until):
    process, paths = run("trap 'echo leaving; exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    until(lambda: paths.log(0).exists() and "ready" in paths.log(0).read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
    assert "leaving" in paths.log(0).read_text()
    assert read_json(paths.exit)["exit_code"] == 7


def test_a_program_that_needs_a_while_to_leave_is_waited_for_through_several_terms(run, until):
    body = "trap 'n=$((n+1))' TERM; n=0; echo ready; while ((n < 3)); do sleep 0.05; done; sleep 0.2; exit 5"
    process, paths = run(body)
    until(lambda: paths.log(0).exists() and "ready" in paths.log(0).read_text())
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.15)
    assert process.wait(20) == 5


def test_a_term_before_the_program_runs_ends_the_script(run, until):
    instance = Instance(name="local", launcher="local", prologue=Prologue(commands=["echo ready", "sleep 0.5"]))
    process, paths = run("echo started", instance=instance)
    until(lambda: paths.log(0).exists() and "ready" in paths.log(0).read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert read_json(paths.exit)["exit_code"] == 143
    assert "started" not in paths.log(0).read_text()


def test_training_prepares_once_and_then_starts_every_rank(run):
    body = 'echo "$2 rank=${RANK:-none} local=${LOCAL_RANK:-none} world=${WORLD_SIZE:-none} $MASTER_ADDR"'
    process, paths = run(f"MASTER_ADDR=${{MASTER_ADDR:-}}; {body}", template="train")
    assert process.wait(20) == 0
    lines = [line for line in paths.log(0).read_text().splitlines() if "tfslurm" in line]
    assert lines[0] == "tfslurm.training.prepare rank=none local=none world=none "
    assert sorted(lines[1:]) == [
        f"tfslurm.training.trainer rank={rank} local={rank} world=2 127.0.0.1" for rank in (0, 1)
    ]


def test_no_rank_starts_where_preparing_failed(run):
    process, paths = run('echo "$2"; exit 5', template="train")
    assert process.wait(20) == 5
    assert "trainer" not in paths.log(0).read_text()
    assert read_json(paths.exit)["exit_code"] == 5


RANKS = """[[ $2 == *prepare ]] && exit
echo $$ >"$3/rank-$RANK"
"""


def ranks(paths, until):
    files = [paths.folder / f"rank-{rank}" for rank in (0, 1)]
    return [int(until(lambda file=file: file.exists() and file.read_text().strip())) for file in files]


def gone(pid):
    return not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_killing_one_rank_ends_the_others_with_exit_code_137(run, until):
    process, paths = run(RANKS + "exec sleep 60", template="train")
    first, second = ranks(paths, until)
    os.kill(second, signal.SIGKILL)
    assert process.wait(20) == 137
    until(lambda: gone(first))
    assert read_json(paths.exit)["exit_code"] == 137


def test_a_rank_that_fails_ends_the_others_with_its_code(run, until):
    body = (
        RANKS + "if [[ $RANK == 1 ]]; then while [[ ! -s $3/rank-0 ]]; do sleep 0.05; done; exit 4; fi\nexec sleep 60"
    )
    process, paths = run(body, template="train")
    assert process.wait(20) == 4
    until(lambda: gone(ranks(paths, until)[0]))


def test_a_rank_that_is_done_early_does_not_end_the_others(run):
    process, paths = run(RANKS + '[[ $RANK == 1 ]] && sleep 0.4\necho "rank $RANK done"', template="train")
    assert process.wait(20) == 0
    assert "rank 1 done" in paths.log(0).read_text()


def test_every_rank_gets_a_term_and_may_leave_by_itself(run, until):
    body = RANKS + 'trap "sleep 0.3; echo left $RANK; exit 6" TERM\necho ready\nwhile :; do sleep 0.05; done'
    process, paths = run(body, template="train")
    until(lambda: paths.log(0).exists() and paths.log(0).read_text().count("ready") == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 6
    assert "left" in paths.log(0).read_text()


def test_every_rank_that_leaves_well_after_a_term_makes_a_good_end(run, until):
    body = RANKS + 'trap "sleep 0.$((RANK + 1)); exit 0" TERM\necho ready\nwhile :; do sleep 0.05; done'
    process, paths = run(body, template="train")
    until(lambda: paths.log(0).exists() and paths.log(0).read_text().count("ready") == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_ranks_that_die_of_a_term_give_143(run, until):
    process, paths = run(RANKS + "exec sleep 60", template="train")
    ranks(paths, until)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert read_json(paths.exit)["exit_code"] == 143


def test_a_second_attempt_has_its_own_log_and_forgets_the_first_ones_end(run):
    process, paths = run("exit 1")
    process.wait(20)
    paths.outcome.write_text("{}")
    process, _ = run('ls "$3"; exit 0', environment={"SLURM_RESTART_COUNT": "1"})
    assert process.wait(20) == 0
    assert read_json(paths.exit)["attempt"] == read_json(paths.started)["attempt"] == 1
    assert "outcome.json" not in paths.log(1).read_text()
    assert "exit.json" not in paths.log(1).read_text()
    assert "attempt 0" in paths.log(0).read_text()


def test_the_program_knows_root_attempt_and_address(run, tmp_path):
    process, paths = run(
        'echo "$TFSLURM_ROOT|$TFSLURM_CONFIG|$TFSLURM_NODE_ADDRESS|$TFSLURM_ATTEMPT"', config=Path("/my site.yaml")
    )
    assert process.wait(20) == 0
    assert f"{tmp_path}/some root|/my site.yaml|127.0.0.1|0" in paths.log(0).read_text()


def test_a_prologue_that_fails_ends_the_run_before_the_program(run):
    for prologue in (Prologue(virtualenv="/nowhere"), Prologue(modules=["cuda"]), Prologue(conda="x")):
        instance = Instance(name="local", launcher="local", prologue=prologue)
        process, paths = run("echo started", instance=instance)
        assert process.wait(20) != 0
        assert "started" not in paths.log(0).read_text()


@pytest.mark.skipif(
    not Path("/etc/profile.d/modules.sh").exists(),
    reason="environment modules are not installed (apt-get install environment-modules)",
)
def test_real_modules_a_real_virtualenv_and_the_variables_are_there_for_the_program(run, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "cuda").write_text("#%Module\nsetenv CUDA_HOME /opt/some/cuda\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "a venv"], check=True)
    prologue = Prologue(
        modules=["cuda"],
        virtualenv=str(tmp_path / "a venv"),
        environment={"MOTTO": "it's $HOME"},
        commands=["export LATE=$CUDA_HOME/bin"],
    )
    instance = Instance(name="local", launcher="local", prologue=prologue)
    body = 'echo "$CUDA_HOME|$VIRTUAL_ENV|$MOTTO|$LATE|$(command -v python)"'
    process, paths = run(body, instance=instance, environment={"MODULEPATH": str(tmp_path / "modules")})
    assert process.wait(20) == 0, paths.log(0).read_text()
    venv = tmp_path / "a venv"
    expected = f"/opt/some/cuda|{venv}|it's $HOME|/opt/some/cuda/bin|{venv}/bin/python"
    assert expected in paths.log(0).read_text()


SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def slurm(program, tmp_path, monkeypatch):
    """Commands that stand in for Slurm's on a node; what they were asked stands in the file."""
    asked = tmp_path / "asked"
    asked.touch()
    program("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    program("scontrol", f'echo "scontrol $*" >>{asked}; [[ $1 != show ]] || echo "NodeAddr=127.0.0.1"')
    path = program("squeue", f'echo "squeue $*" >>{asked}; cat {tmp_path}/state')
    (tmp_path / "state").write_text("RUNNING\n")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return asked


LEAVES = """
[[ $2 == *trainer ]] || exit 0
touch "$3/running"
until [[ -e $3/leave ]]; do sleep 0.05; done
exit 75
"""


def test_the_job_that_came_first_runs_and_another_one_touches_nothing(run, slurm):
    process, paths = run('[[ $2 != *trainer ]] || echo ran >>"$3/ran"', "train", SLURM)
    assert process.wait(20) == 0
    before = {path.name: path.stat().st_mtime_ns for path in paths.folder.iterdir() if path.name != "script.sh"}
    assert paths.claim("u-1").read_text() == "42\n"
    process, _ = run('[[ $2 != *trainer ]] || echo ran >>"$3/ran"', "train", {**SLURM, "SLURM_JOB_ID": "41"})
    assert process.wait(20) == 0
    assert {path.name: path.stat().st_mtime_ns for path in paths.folder.iterdir() if path.name != "script.sh"} == before
    assert (paths.folder / "ran").read_text() == "ran\n"


def test_a_job_that_is_started_again_keeps_its_claim_and_counts_on(run, slurm):
    for restarts, attempt in (("", 3), ("1", 4), ("2", 5)):
        process, paths = run("exit 0", "train", {**SLURM, "SLURM_RESTART_COUNT": restarts}, first_attempt=3)
        assert process.wait(20) == 0
        started, ended = read_json(paths.started), read_json(paths.exit)
        assert (started["attempt"], ended["attempt"], started["slurm_job_id"]) == (attempt, attempt, "42")
        assert paths.log(attempt).exists()


def test_of_many_that_start_at_once_one_runs(run, slurm):
    process, paths = run('[[ $2 != *trainer ]] || echo ran >>"$3/ran"', "train", {**SLURM, "SLURM_JOB_ID": "9"})
    environ = {**os.environ, **SLURM}
    others = [
        subprocess.Popen(["bash", paths.script], env={**environ, "SLURM_JOB_ID": str(n)}, stdout=subprocess.DEVNULL)
        for n in range(1, 9)
    ]
    assert [other.wait(30) for other in (process, *others)] == [0] * 9
    assert (paths.folder / "ran").read_text() == "ran\n"
    assert not list(paths.folder.glob("claim-*.*"))


def test_a_folder_that_cannot_be_written_is_an_error_and_no_duplicate(run, slurm, tmp_path):
    process, paths = run("exit 0", "train", SLURM)
    process.wait(20)
    (paths.claim("u-1")).write_text("")  # as a full disk leaves it, without hard links
    process, _ = run("exit 0", "train", SLURM)
    assert process.wait(20) == 1


def test_usr2_makes_the_trainer_leave_and_the_job_is_queued_again(run, slurm, until):
    process, paths = run(LEAVES, "train", SLURM)
    until((paths.folder / "running").exists)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 75
    assert paths.leave.exists()
    assert read_json(paths.exit)["exit_code"] == 75
    assert slurm.read_text().splitlines()[-2:] == ["squeue --noheader --format=%T --jobs=42", "scontrol requeue 42"]
    assert not (paths.folder / "synced").exists()  # Slurm kills what it starts again
    process, _ = run("[[ ! -e $3/leave ]]", "train", {**SLURM, "SLURM_RESTART_COUNT": "1"})
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("prepare", "fields"),
    [("state", {}), ("stop", {}), ("refuse", {}), ("", {"requeue": False})],
    ids=["cancelled", "stopping", "refused", "forbidden"],
)
def test_a_job_that_slurm_does_not_queue_again_ends_with_75_and_syncs(
    run, slurm, until, program, tmp_path, prepare, fields
):
    if prepare == "refuse":
        program("scontrol", '[[ $1 == show ]] || { echo "Requested operation is presently disabled" >&2; exit 1; }')
    elif prepare == "state":
        (tmp_path / "state").write_text("COMPLETING\n")
    process, paths = run(LEAVES, "train", SLURM, **fields)
    until((paths.folder / "running").exists)
    if prepare == "stop":
        paths.stop.touch()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 75
    assert "scontrol requeue" not in slurm.read_text()
    assert (paths.folder / "synced").read_text() == "-m tfslurm sync --quiet\n"


def test_a_term_from_slurm_makes_the_trainer_leave_by_itself(run, slurm, until):
    process, paths = run(LEAVES, "train", SLURM)
    until((paths.folder / "running").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert paths.leave.exists()
    assert slurm.read_text().splitlines()[-1] == "scontrol requeue 42"


def test_a_term_from_slurm_ends_at_once_what_was_to_stop(run, slurm, until):
    process, paths = run(LEAVES, "train", SLURM)
    until((paths.folder / "running").exists)
    paths.stop.touch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert not paths.leave.exists()
    assert "scontrol requeue" not in slurm.read_text()


def test_a_term_while_it_prepares_ends_it(run, slurm, until):
    process, paths = run('touch "$3/preparing"; sleep 30', "train", SLURM)
    until((paths.folder / "preparing").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert not paths.leave.exists()


def test_a_trainer_that_made_no_steps_is_not_queued_again(run, slurm):
    process, paths = run("[[ $2 != *trainer ]] || exit 76", "train", SLURM)
    assert process.wait(20) == 76
    assert "requeue" not in slurm.read_text()


def test_without_slurm_leaving_ends_the_script(run, until):
    process, paths = run(LEAVES, "train")
    until((paths.folder / "running").exists)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 75
    assert not list(paths.folder.glob("claim-*"))
    assert (paths.folder / "synced").exists()


def test_a_training_that_has_succeeded_is_not_begun_again(run, slurm):
    body = """[[ $2 != *trainer ]] || echo '{"result": "succeeded"}' >"$3/outcome.json"; echo $2 >>"$3/ran" """
    process, paths = run(body, "train", SLURM)
    assert process.wait(20) == 0
    ran = (paths.folder / "ran").read_text()
    process, _ = run(body, "train", {**SLURM, "SLURM_RESTART_COUNT": "1"})
    assert process.wait(20) == 0
    assert (paths.folder / "ran").read_text() == ran
    assert read_json(paths.outcome) == {"result": "succeeded"}
    assert (read_json(paths.started)["attempt"], read_json(paths.exit)["attempt"]) == (1, 1)
    paths.outcome.write_text('{"result": "failed", "error": "succeeded"}')
    process, _ = run(body, "train", {**SLURM, "SLURM_RESTART_COUNT": "2"})
    assert process.wait(20) == 0
    assert (paths.folder / "ran").read_text() != ran


def test_the_trainer_is_told_what_it_has_to_know(run, slurm):
    names = "TFSLURM_WORLD_SIZE TFSLURM_BARREN_ATTEMPTS TFSLURM_ATTEMPT MASTER_ADDR"
    body = f'[[ $2 != *trainer ]] || for name in {names}; do echo "$name=${{!name}}" >>"$3/told"; done'
    process, paths = run(body, "train", SLURM, barren_attempts=7, first_attempt=2)
    assert process.wait(20) == 0
    told = (paths.folder / "told").read_text().split()
    assert told == ["TFSLURM_WORLD_SIZE=2", "TFSLURM_BARREN_ATTEMPTS=7", "TFSLURM_ATTEMPT=2", "MASTER_ADDR=127.0.0.1"]


def test_a_port_that_is_taken_is_not_the_masters(run, slurm):
    body = '[[ $2 != *trainer ]] || echo $MASTER_PORT >"$3/port"'
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 20000 + 42 * 7))
        taken.listen()
        process, paths = run(body, "train", SLURM)
        assert process.wait(20) == 0
    assert (paths.folder / "port").read_text() == f"{20000 + 42 * 7 + 1}\n"


def test_each_task_of_an_array_is_its_own_submission(run, slurm, tmp_path):
    folders = [tmp_path / "jobs" / f"job {n}" for n in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
    cells = tmp_path / "some cells"
    cells.write_text("".join(f"u-{n}\t{folder}\n" for n, folder in enumerate(folders)))
    array = Array(size=2, cells=cells)
    for task, code in (("0", 0), ("1", 75), ("2", 1)):
        environment = {**SLURM, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": f"4{task}"}
        process, _ = run(
            "[[ $2 != *trainer || $SLURM_ARRAY_TASK_ID == 0 ]] || exit 75", "train", environment, array=array
        )
        assert process.wait(20) == code
    for number, folder in enumerate(folders):
        paths = RunPaths(folder)
        assert read_json(paths.started)["uuid"] == read_json(paths.exit)["uuid"] == f"u-{number}"
        assert paths.claim(f"u-{number}").read_text() == "40\n"
        assert paths.log(0).exists()
    assert "scontrol requeue 40_1" in slurm.read_text()


def test_a_periodic_sync_queues_one_successor_and_none_after_a_stop(run, program, tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    path = program("sbatch", f'echo "$*" >>{asked}')
    program("squeue", f"cat {tmp_path}/queued")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    (tmp_path / "queued").touch()
    process, paths = run('echo "$*" >"$TFSLURM_ROOT"; echo "$*"', "sync", minutes=3)
    assert process.wait(20) == 0
    assert asked.read_text() == f"--begin=now+3minutes {paths.script}\n"
    (tmp_path / "queued").write_text("77\n")
    assert run("exit 0", "sync")[0].wait(20) == 0
    (tmp_path / "queued").write_text("")
    paths.stop.touch()
    assert run("exit 4", "sync")[0].wait(20) == 4
    assert asked.read_text().count("begin") == 1


def test_a_prologue_may_read_variables_that_nobody_set(run):
    instance = Instance(name="local", launcher="local", prologue=Prologue(commands=['echo "unset: $NOBODY_SET_IT"']))
    process, paths = run("echo started", instance=instance)
    assert process.wait(20) == 0
    assert "started" in paths.log(0).read_text()
