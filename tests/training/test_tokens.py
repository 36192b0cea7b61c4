from __future__ import annotations

import multiprocessing

import h5py
import numpy as np
import pytest

from tfslurm.training.masks import Encoded, Rejected
from tfslurm.training.selection import select
from tfslurm.training.tokens import Source, TokenFile, write_tokens

SOURCE = Source(
    dataset_digest="sha256:1", tokenizer_hash="t", template_hash="c", format="text", field_map={"text": "t"}
)
ROWS = [
    Encoded([1, 2, 3, 4, 5], [(1, 2), (3, 5)]),
    Rejected("no token of it carries loss"),
    Encoded([6, 7], [(1, 2)]),
    Encoded(list(range(10, 20)), [(8, 10)]),
]


@pytest.fixture
def tokens(tmp_path):
    write_tokens(tmp_path / "a" / SOURCE.file_name, ROWS, SOURCE, 60_000)
    return TokenFile(tmp_path / "a" / SOURCE.file_name)


def test_rows_come_back_with_their_masks(tokens):
    ids, mask = tokens.row(0, 100)
    assert ids.tolist() == [1, 2, 3, 4, 5] and mask.tolist() == [False, True, False, True, True]
    assert len(tokens) == 3 and tokens.rows.tolist() == [0, 2, 3]
    assert [tokens.row(i, 100)[0].tolist() for i in (1, 2)] == [[6, 7], list(range(10, 20))]


def test_a_limit_cuts_tokens_and_mask_without_tokenizing_again(tokens):
    ids, mask = tokens.row(0, 4)
    assert ids.tolist() == [1, 2, 3, 4] and mask.tolist() == [False, True, False, True]
    assert tokens.supervised(100).tolist() == [3, 1, 2]
    assert tokens.supervised(4).tolist() == [2, 1, 0]


def test_the_file_is_contiguous_and_says_what_it_was_made_from(tokens):
    with h5py.File(tokens.path) as file:
        assert file["tokens"].chunks is None and file["tokens"].dtype == np.uint16
        assert file["offsets"].dtype == np.int64
        assert file.attrs["dataset_digest"] == "sha256:1"
        assert file.attrs["tokenizer_hash"] == "t" and file.attrs["template_hash"] == "c"
        assert file.attrs["format"] == "text" and file.attrs["field_map"] == '{"text": "t"}'
    assert isinstance(tokens._tokens, np.memmap)


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    write_tokens(tmp_path / "x.h5", [Encoded([1, 100_000], [(1, 2)])], SOURCE, 128_000)
    assert TokenFile(tmp_path / "x.h5").row(0, 9)[0].tolist() == [1, 100_000]


def test_rejected_rows_are_counted_by_reason_with_their_numbers(tokens):
    (reason,) = tokens.rejected
    assert reason == "no token of it carries loss"
    assert tokens.rejected[reason].count == 1 and tokens.rejected[reason].first == [1]


@pytest.mark.parametrize(
    "change",
    [{"dataset_digest": "x"}, {"tokenizer_hash": "x"}, {"template_hash": "x"}, {"format": "x"}, {"field_map": {}}],
)
def test_whatever_changes_the_tokens_changes_the_files_name(change):
    import msgspec

    assert msgspec.structs.replace(SOURCE, **change).file_name != SOURCE.file_name


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def rows():
        yield ROWS[0]
        raise RuntimeError("the row is broken")

    with pytest.raises(RuntimeError):
        write_tokens(tmp_path / "x.h5", rows(), SOURCE, 100)
    assert list(tmp_path.iterdir()) == []


def write_many(path, barrier):
    barrier.wait()
    write_tokens(path, [Encoded([1, 2, 3], [(1, 3)])] * 3000, SOURCE, 100)


def test_two_processes_may_write_the_same_file_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=write_many, args=(tmp_path / "x.h5", barrier)) for _ in range(2)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]
    assert len(TokenFile(tmp_path / "x.h5")) == 3000


def test_overlong_rows_are_truncated_and_told_and_dropped_where_nothing_is_left_to_learn(tokens):
    chosen = select(tokens, 4, "truncate")
    assert chosen.kept.tolist() == [0, 1] and chosen.lengths.tolist() == [4, 2] and chosen.supervised.tolist() == [2, 1]
    assert (chosen.truncated.count, chosen.truncated.first) == (1, [0])
    assert (chosen.dropped.count, chosen.dropped.first) == (1, [3])


def test_overlong_rows_are_dropped_where_the_site_says_so(tokens):
    chosen = select(tokens, 5, "drop")
    assert chosen.kept.tolist() == [0, 1] and chosen.truncated.count == 0 and chosen.dropped.first == [3]
    assert select(tokens, 4, "drop").dropped.first == [0, 3]
