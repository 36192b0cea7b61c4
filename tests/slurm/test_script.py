"""The rendered script, run for real; a shell script stands in for the interpreter of the node."""

import os
import shlex
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tfslurm.files import read_json
from tfslurm.paths import RunPaths
from tfslurm.settings import Instance, Prologue
from tfslurm.slurm.templates import Script, render


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
    process, paths = run(RANKS + "[[ $RANK == 1 ]] && exit 4\nexec sleep 60", template="train")
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


def test_a_prologue_may_read_variables_that_nobody_set(run):
    instance = Instance(name="local", launcher="local", prologue=Prologue(commands=['echo "unset: $NOBODY_SET_IT"']))
    process, paths = run("echo started", instance=instance)
    assert process.wait(20) == 0
    assert "started" in paths.log(0).read_text()
