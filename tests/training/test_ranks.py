from __future__ import annotations

import subprocess
import sys

import pytest

from tfslurm.errors import ConfigurationError
from tfslurm.training.ranks import Rank, attempt_number, planned_processes, usable_threads

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_nothing_set_is_a_single_process():
    assert Rank.from_environment({}) == Rank(0, 1, 0)


def test_slurm_says_who_we_are_where_no_launcher_does():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert Rank.from_environment(slurm | MASTER) == Rank(3, 4, 1)


def test_a_launcher_goes_before_slurm():
    both = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert Rank.from_environment(both | MASTER) == Rank(1, 2, 0)


def test_several_processes_must_know_where_to_meet():
    with pytest.raises(ConfigurationError, match="MASTER_PORT not set for 2 processes"):
        Rank.from_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1"})


def test_a_single_process_meets_itself_at_a_free_port():
    environment: dict[str, str] = {}
    Rank(0, 1, 0).export(environment)
    assert environment["WORLD_SIZE"] == "1" and int(environment["MASTER_PORT"]) > 0


def test_the_batch_script_says_which_attempt_it_is_and_how_many_processes_run():
    assert (attempt_number({}), planned_processes({}, 4)) == (0, 4)
    environment = {"TFSLURM_ATTEMPT": "2", "TFSLURM_WORLD_SIZE": "8"}
    assert (attempt_number(environment), planned_processes(environment, 4)) == (2, 8)


def test_redirected_output_is_appended_also_that_of_other_programs(tmp_path):
    log = tmp_path / "logs" / "attempt-0.rank-1.log"
    program = f"""
import os, pathlib, sys
from tfslurm.training.ranks import redirect_output
print("before")
redirect_output(pathlib.Path({str(log)!r}))
print("printed", flush=True)
os.system("echo from a child; echo an error >&2")
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("before\n", "")
    assert log.read_text() == "printed\nfrom a child\nan error\n" * 2


def test_threads_follow_the_instance_that_runs_the_attempt_rather_than_the_one_that_was_configured():
    assert usable_threads({"OMP_NUM_THREADS": "12"}, 4) == 12
    assert usable_threads({}, 4) == 4
