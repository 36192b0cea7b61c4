import subprocess
import sys

import pytest

from tfslurm.catalog import leases
from tfslurm.catalog.leases import lease
from tfslurm.catalog.models import Lease, now


def test_a_lease_is_held_by_one_at_a_time_and_free_afterwards(installation):
    with lease("sync", seconds=60) as mine:
        with lease("sync", seconds=60) as other, lease("another", seconds=60) as unrelated:
            assert (mine, other, unrelated) == (True, False, True)
        with lease("sync", seconds=60) as still:
            assert not still
    with lease("sync", seconds=60) as again:
        assert again


def test_a_lease_is_free_after_an_error(installation):
    with pytest.raises(RuntimeError), lease("sync", seconds=60):
        raise RuntimeError
    with lease("sync", seconds=60) as again:
        assert again


def test_within_the_floor_it_is_not_got_again(installation):
    with lease("sync", seconds=60):
        pass
    with lease("sync", seconds=60, floor=60) as soon:
        assert not soon
    with lease("sync", seconds=60, floor=0) as later:
        assert later


def test_one_that_ran_out_is_taken_over_and_not_given_back_by_its_old_holder(installation, monkeypatch):
    with lease("sync", seconds=-1) as first:
        with lease("sync", seconds=60) as second:
            assert first and second
            # The first one ends here, inside of the second's time.
            leases.Lease.update(expires_at=now()).where(Lease.holder == "nobody").execute()
            inner = Lease.get(Lease.name == "sync")
    assert Lease.get(Lease.name == "sync").holder == inner.holder


def test_of_many_processes_just_one_gets_it(installation):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tfslurm import settings\nfrom tfslurm.catalog import db\n"
        "from tfslurm.catalog.leases import lease\n"
        "db.connect(settings.load(root=Path(sys.argv[1]), environ={}))\n"
        "with lease('x', seconds=60, floor=60) as taken: print(taken)"
    )
    command = [sys.executable, "-c", script, installation.root.path]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0].strip() for process in started]
    assert sorted(said) == ["False"] * 3 + ["True"]
