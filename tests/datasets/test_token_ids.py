"""The largest token id of a pretokenized dataset: exact, however the file is cut, and nearly for nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfslurm.datasets import scan
from tfslurm.datasets.rows import FamiliarRow, PretokenizedLines, PretokenizedRow
from tfslurm.datasets.validation import Validator, validate


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def largest_of(path, rows, format="pretokenized", **options):
    path.write_text(lines_of(rows))
    return validate(path, format, **options).statistics.max_token_id


@pytest.mark.parametrize(
    ("rows", "largest"),
    [
        ([{"input_ids": [5, 49151, 7]}], 49151),
        ([{"input_ids": [0]}], 0),
        ([{"input_ids": [2**31 - 1]}, {"input_ids": [3]}], 2**31 - 1),
        ([{"input_ids": [5, 6], "labels": [-100, 9]}], 9),
        ([{"input_ids": [5, 6], "labels": None}, {"input_ids": [1], "labels": [-100]}], 6),
        ([{"input_ids": []}], None),
        ([{"input_ids": [5], "extra": "unknown to the format"}, {"input_ids": [4]}], 5),
    ],
)
def test_it_is_the_largest_of_tokens_and_labels(tmp_path, rows, largest):
    assert largest_of(tmp_path / "a.jsonl", rows) == largest


def test_other_formats_have_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Once upon a time."}\n')
    report = validate(path, "text")
    assert report.to_dict()["statistics"]["max_token_id"] is None
    assert "token id" not in report.describe()


def test_a_row_that_is_refused_does_not_count(tmp_path):
    rows = [{"input_ids": [5]}, {"input_ids": [900, -1]}, {"input_ids": [800], "labels": [1, 2]}]
    assert largest_of(tmp_path / "a.jsonl", rows) == 5


ids = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 100), min_size=1, max_size=6)
good = st.builds(lambda found: {"input_ids": found}, ids) | ids.flatmap(
    lambda found: st.builds(
        lambda labels: {"input_ids": found, "labels": labels},
        st.lists(st.just(-100) | st.integers(0, 200), min_size=len(found), max_size=len(found)),
    )
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(good, min_size=1, max_size=40), block=st.integers(1, 400))
def test_it_is_the_same_line_by_line_and_in_blocks(tmp_path_factory, rows, block):
    path = tmp_path_factory.mktemp("ids") / "a.jsonl"
    path.write_text(lines_of(rows))
    wanted = max(max(*row["input_ids"], *row.get("labels", ()), -1, -1) for row in rows)
    alone = Validator("pretokenized", {})
    alone.check_file(path, "a.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCK", block)
        together = validate(path, "pretokenized", workers=1)
    assert together.statistics.max_token_id == wanted
    assert together == alone.report()


def test_several_workers_find_it_in_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "SMALL", 0)
    monkeypatch.setattr(scan, "CHUNK", 4096)
    rows = [{"input_ids": [number * 7919 % 50_000 for number in range(row, row + 50)]} for row in range(400)]
    wanted = max(max(row["input_ids"]) for row in rows)
    assert largest_of(tmp_path / "a.jsonl", rows, workers=3) == wanted


def test_fields_of_other_names_are_looked_at_too(tmp_path):
    path = tmp_path / "a.jsonl"
    assert largest_of(path, [{"ids": [7, 8]}, {"ids": [1, 2]}, {"ids": [9]}], field_map={"input_ids": "ids"}) == 9


def test_the_search_is_left_to_the_decoder_once_the_ids_are_known():
    decode = PretokenizedLines({})
    first, second = b'{"input_ids": [5]}\n', b'{"input_ids": [5, 6]}\n'
    assert familiar(decode(first)) == [False]
    decode.learn(5)
    assert familiar(decode(first)) == [True]
    assert familiar(decode(first + second)) == [False, False]


def familiar(decoded):
    assert all(isinstance(row, PretokenizedRow) for row in decoded)
    return [isinstance(row, FamiliarRow) for row in decoded]


def test_a_sealed_dataset_says_it(installation):
    from tfslurm.datasets import registry
    from tfslurm.datasets.sealing import seal

    made = registry.create(installation.settings, "ids", "pretokenized", {})
    (installation.root.assembling(made.artifact_id) / "a.jsonl").write_text(lines_of([{"input_ids": [3, 49152]}]))
    seal(installation.settings, made)
    assert installation.json("dataset", "show", "ids")["metadata"]["statistics"]["max_token_id"] == 49152
    text = installation.run(
        "dataset", "validate", str(installation.root.dataset(made.artifact_id)), "--format", "pretokenized", check=0
    ).stdout
    assert "largest token id: 49,152" in text
