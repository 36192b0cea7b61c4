import os
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfslurm import identity
from tfslurm.errors import InvalidError
from tfslurm.identity import ID, PREFIXES, check_name, checkpoint_id, current_user, new_id, new_ids


def test_ids_have_their_kind_and_are_all_different():
    for kind, prefix in PREFIXES.items():
        ids = {new_id(kind) for _ in range(1000)}
        assert len(ids) == 1000
        assert all(ID.fullmatch(name) and name.startswith(f"{prefix}-") for name in ids)


def test_many_ids_at_once_keep_their_order():
    ids = new_ids("job", 5000)
    assert ids == sorted(set(ids))
    assert all(ID.fullmatch(name) for name in ids)


@given(st.lists(st.integers(min_value=0, max_value=2**49), min_size=2, unique=True))
def test_ids_sort_by_their_time(milliseconds):
    patch = pytest.MonkeyPatch()
    made = []
    try:
        for moment in sorted(milliseconds):
            patch.setattr(identity.time, "time_ns", lambda moment=moment: moment * 1_000_000)
            made.append(new_id("job"))
    finally:
        patch.undo()
    assert made == sorted(made)


def test_the_checkpoint_of_a_job_is_known_beforehand():
    job = new_id("job")
    assert checkpoint_id(job) == checkpoint_id(job) == job.replace("job-", "ckpt-")
    assert ID.fullmatch(checkpoint_id(job))


@pytest.mark.parametrize("name", ["a", "7", "help-desk.v1_2", "a" * 63, "ds-1"])
def test_plain_names_are_allowed(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "A", "a b", "-a", "a-", ".a", "a.", "a/b", "../a", "ä", "a\n", "a" * 64, "$(x)", "a;b", "--help", "a\0", "'"],
)
def test_other_names_are_refused_with_the_rule(name):
    with pytest.raises(InvalidError, match="is not allowed") as caught:
        check_name(name)
    assert "1 to 63 lower-case letters" in caught.value.hint


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_name_that_looks_like_an_id_is_refused(kind):
    with pytest.raises(InvalidError, match="looks like an id"):
        check_name(new_id(kind))


def test_the_current_user_is_named_also_without_an_account(monkeypatch):
    assert current_user() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(identity.os, "getuid", lambda: 3_999_999_999)
    assert current_user() == "3999999999"
