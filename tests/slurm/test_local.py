import os
import signal
import subprocess

import pytest

from tfslurm.process import alive, handle, start_ticks
from tfslurm.slurm.local import end, start


@pytest.fixture
def begin(tmp_path):
    """Start a script in the background; its handle."""
    handles = []

    def begin(body):
        script = tmp_path / "a script.sh"
        script.write_text(body)
        handles.append(start(script))
        return handles[-1]

    yield begin
    for name in handles:
        end(name, signal.SIGKILL)


def test_a_script_runs_in_a_session_of_its_own_without_the_callers_slurm(begin, tmp_path, until, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    said = tmp_path / "said"
    body = f'echo "$(ps -o sid= -p $$) ${{SLURM_JOB_ID:-none}} $PWD" >"{said}.new"; mv "{said}.new" "{said}"; sleep 9'
    name = begin(body)
    session, job, folder = until(lambda: said.exists() and said.read_text()).split()
    assert (session, job, folder) == (name.partition(":")[0], "none", "/")
    assert alive(name)


def test_a_script_that_has_ended_is_not_alive(begin, until):
    name = begin("exit 0")
    until(lambda: not alive(name))


def test_ending_reaches_the_whole_group(begin, tmp_path, until):
    name = begin(f'sleep 60 & echo $! >"{tmp_path}/child"; wait')
    child = int(until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
    assert alive(handle(child))
    end(name, signal.SIGKILL)
    until(lambda: not alive(name) and not os.path.exists(f"/proc/{child}/fd/0"))


def test_what_outlives_its_leader_is_ended_too(begin, tmp_path, until):
    name = begin(f'sleep 60 & echo $! >"{tmp_path}/child"')
    child = int(until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
    until(lambda: not alive(name))
    kept = handle(child)
    end(name, signal.SIGKILL)
    until(lambda: not alive(kept))


def test_a_stranger_who_got_the_id_is_neither_alive_nor_ended(until):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        recycled = f"{stranger.pid}:1"
        assert not alive(recycled)
        end(recycled, signal.SIGKILL)
        with pytest.raises(subprocess.TimeoutExpired):
            stranger.wait(0.2)
    finally:
        stranger.kill()
        stranger.wait()


def test_ending_what_is_gone_does_nothing():
    process = subprocess.Popen(["true"], start_new_session=True)
    name = handle(process.pid)
    process.wait()
    assert not alive(name)
    end(name, signal.SIGTERM)


def test_a_name_with_brackets_and_blanks_does_not_confuse_the_start_time(tmp_path):
    odd = tmp_path / "a) R (b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "60"])
    try:
        assert alive(handle(process.pid))
        assert start_ticks(process.pid) > 1
    finally:
        process.kill()
        process.wait()
    assert not alive(f"{process.pid}:0")
