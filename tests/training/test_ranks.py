from __future__ import annotations

import pytest

from tfslurm.errors import ConfigurationError
from tfslurm.training.ranks import Rank

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
