from __future__ import annotations

import msgspec
import pytest

from tfslurm.errors import InvalidError
from tfslurm.files import read_json
from tfslurm.training import caps
from tfslurm.training.plan import Plan
from tfslurm.training.prepare import main


def test_lowering_takes_a_fifth_off_what_did_not_fit_and_is_remembered(tmp_path):
    path = tmp_path / "cap.json"
    assert caps.read(path) is None and caps.capacity(path, 4096) == 4096 and caps.lowered(None) == 0
    first = caps.lower(path, caps.OutOfMemory(3, 4000), None, 4096)
    assert (first.tokens, first.lowered) == (3200, 1) and caps.read(path) == first
    second = caps.lower(path, caps.OutOfMemory(2, 3200), first, 3200)
    assert (second.tokens, second.lowered) == (2560, 2)
    assert (caps.capacity(path, 4096), caps.capacity(path, 1000)) == (2560, 1000)


def test_lowering_ends_at_a_single_row_and_after_so_many_times(tmp_path):
    path = tmp_path / "cap.json"
    with pytest.raises(InvalidError, match="a single row of 900 tokens does not fit") as raised:
        caps.lower(path, caps.OutOfMemory(1, 900), None, 4096)
    assert "--max-seq-length" in raised.value.hint and not path.exists()
    last = caps.Cap(tokens=1000, lowered=caps.MOST)
    with pytest.raises(InvalidError, match=f"lowered {caps.MOST} times, to 1,000"):
        caps.lower(path, caps.OutOfMemory(2, 900), last, 1000)
    assert not path.exists()


def test_a_repacked_plan_has_the_same_steps_of_smaller_micro_batches(make_job):
    job = make_job(world=2, epochs=2)
    job.prepare()
    plan = Plan.load(job.paths.plan)
    lengths = tokens_of(job).lengths
    small = plan.repacked(lengths, 60)
    assert small.capacity == 60 < plan.capacity == 200
    assert len(small.bin_offsets) > len(plan.bin_offsets)
    for step in range(plan.steps):
        assert sorted(small.examples_of(step)) == sorted(plan.examples_of(step))
        sizes = [[len(batch) for batch in small.micro_batches(step, rank)] for rank in range(2)]
        assert len(sizes[0]) == len(sizes[1])
        for batch in (*small.micro_batches(step, 0), *small.micro_batches(step, 1)):
            assert len(batch) <= 1 or lengths[batch].sum() <= 60
    assert (small.supervised == plan.supervised).all() and (small.tokens == plan.tokens).all()


def tokens_of(job):
    from tfslurm.training.tokens import TokenFile

    return TokenFile(job.paths.folder / read_json(job.paths.prepared)["tokens"])


def test_an_attempt_after_one_that_ran_out_of_memory_is_planned_with_its_cap(make_job):
    job = make_job()
    job.paths.cap.write_bytes(msgspec.json.encode(caps.Cap(tokens=80, lowered=3)))
    job.prepare()
    assert Plan.load(job.paths.plan).capacity == 80


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_runs_out_lowers_the_cap_and_the_training_goes_on_as_it_would_have(make_job, world):
    """More than 180 tokens in one micro-batch do not fit, it seems; the second step is the first that has one."""
    whole = make_job("whole", epochs=2)
    whole.prepare()
    assert whole.train_here() == 0
    job = make_job(epochs=2, world=world, save_minutes=1e-9)
    job.prepare()
    port = job.free_port()
    processes = [job.start(rank, world, port, TFSLURM_FAULT="out-of-memory:180") for rank in range(world)]
    logs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, logs[0]
    cap = read_json(job.paths.cap)
    assert 0.8 * 180 <= cap["tokens"] <= 160 and cap["lowered"] == 1
    said = logs[0] + "".join(path.read_text() for path in job.paths.logs.glob("*"))
    assert (
        "out of memory, for a micro-batch of" in said and f"with at most {cap['tokens']} tokens a micro-batch" in said
    )
    assert "going on after step 1," in logs[0]
    assert job.losses == pytest.approx(whole.losses, abs=1e-3)
    assert [line["tokens"] for line in job.metrics] == [line["tokens"] for line in whole.metrics]
    assert read_json(job.paths.outcome)["result"] == "succeeded"


def test_a_row_that_does_not_fit_alone_fails_the_job_and_says_what_to_do(make_job, monkeypatch):
    monkeypatch.setenv("TFSLURM_FAULT", "out-of-memory:20")
    job = make_job(micro_batch_tokens=1)
    job.prepare()
    assert job.train_here() == 5
    error = read_json(job.paths.outcome)["error"]
    assert "a single row of" in error and "smaller --max-seq-length" in error
    assert not job.paths.cap.exists() and not job.paths.adapter.exists()


def test_nothing_is_planned_for_a_cap_that_is_none_of_ours(make_job):
    job = make_job()
    job.paths.cap.write_text("{}")
    assert main([str(job.paths.folder)]) != 0
    assert "tokens" in read_json(job.paths.outcome)["error"]
