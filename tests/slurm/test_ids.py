import pytest

from tfslurm.slurm.ids import base, expand, lists, task_id
from tfslurm.slurm.walltime import seconds


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("123", ["123"]),
        ("123_4", ["123_4"]),
        ("123_[4]", ["123_4"]),
        ("123_[0-2,7%2]", ["123_0", "123_1", "123_2", "123_7"]),
        ("123_[0-6:3]", ["123_0", "123_3", "123_6"]),
        ("123_[8,10-11,...]", ["123_8", "123_10", "123_11"]),
    ],
)
def test_every_notation_of_slurm_names_its_tasks(written, meant):
    assert expand(written) == meant
    assert {base(job_id) for job_id in meant} == {"123"}


def test_an_arrays_tasks_are_asked_for_by_the_arrays_id_once():
    assert list(lists(["7", "8_1", "8_2", "7", "9"])) == ["7,8,9"]
    assert list(lists([])) == []
    assert (task_id("8", 2), task_id("8", None)) == ("8_2", "8")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (90, 5400), ("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("1-0", 86400), ("1-2:30", 95400),
        ("1-2:30:15", 95415), ("UNLIMITED", None), ("infinite", None), ("", None), ("a:b", None), ("-1", None),
    ],
)  # fmt: skip
def test_a_walltime_is_read_in_all_its_forms(written, meant):
    assert seconds(written) == meant
