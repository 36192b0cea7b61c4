from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tfslurm.files import read_json
from tfslurm.training import resume
from tfslurm.training.batches import micro_batch
from tfslurm.training.loss import SupervisedLoss
from tfslurm.training.plan import Plan
from tfslurm.training.prepare import main
from tfslurm.training.schedule import validation_points
from tfslurm.training.tokens import TokenFile

WEIGHTS = "adapter_model.safetensors"


def talk(number, answer):
    question = {"role": "user", "content": f"question {number}: " + "which dataset is ready? " * (number % 4)}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


OTHERS = [talk(number, f"zebra quiz {7 * number} VWXYZ!") for number in range(9)]
"""Unlike what is trained on: the more is learned of that, the worse these become."""


@pytest.fixture
def overfitting(make_job):
    """A job whose validation loss is not the lowest at its end."""

    def make(name="job", **options):
        return make_job(name, **dict(validation_rows=OTHERS, epochs=4, learning_rate=3e-2, validations=6) | options)

    return make


def curve(job):
    return {line["step"]: line["validation_loss"] for line in job.metrics if "validation_loss" in line}


def loss_of_adapter(job):
    """Of the saved adapter on the validation rows, one at a time, without DeepSpeed."""
    prepared = read_json(job.paths.prepared)["validation"]
    base = AutoModelForCausalLM.from_pretrained(job.config.base_model.path, dtype=torch.float32)
    loss = SupervisedLoss(PeftModel.from_pretrained(base, job.paths.adapter).eval(), bounds_on_device=False)
    tokens, rows = TokenFile(job.paths.folder / prepared["tokens"]), Plan.load(job.paths.validation_plan).examples
    limit, device = job.config.hyperparameters.max_seq_length, torch.device("cpu")
    with torch.no_grad():
        total = sum(loss(micro_batch(tokens, np.array([row]), limit, device)).item() for row in rows)
    return total / prepared["supervised_count"]


def test_the_checkpoint_is_the_best_of_the_points_that_were_planned(overfitting):
    job = overfitting()
    job.prepare()
    prepared = read_json(job.paths.prepared)
    assert prepared["validation"]["points"] == [2, 4, 6, 8, 10, 12] and prepared["validation"]["rows"] == len(OTHERS)
    assert job.train_here() == 0
    losses, outcome = curve(job), read_json(job.paths.outcome)
    assert list(losses) == prepared["validation"]["points"]
    best = min(losses, key=losses.get)
    assert best < 12, losses
    assert (outcome["best_step"], outcome["validation_loss"]) == (best, losses[best])
    assert outcome["final_validation_loss"] == losses[12] > losses[best] + 0.01
    assert loss_of_adapter(job) == pytest.approx(losses[best], abs=1e-4)
    assert read_json(job.paths.progress)["validation_loss"] == losses[12]


def test_validating_changes_nothing_of_the_training(overfitting, make_job):
    """Dropout included: it is drawn for each step anew."""
    plain = make_job("plain", epochs=4, learning_rate=3e-2, lora_dropout=0.2)
    job = overfitting(lora_dropout=0.2)
    for each in (plain, job):
        each.prepare()
        assert each.train_here() == 0
    assert job.losses == plain.losses
    outcome = read_json(plain.paths.outcome)
    assert outcome["validation_loss"] is outcome["best_step"] is outcome["final_validation_loss"] is None
    assert not curve(plain)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_measure_what_one_does_and_keep_the_same_weights(overfitting, stage):
    one, two = overfitting("one"), overfitting("two", world=2, zero_stage=stage)
    for job in (one, two):
        job.prepare()
    assert one.train_here() == 0
    log = two.train(2)
    assert curve(two) == pytest.approx(curve(one), abs=1e-3)
    outcomes = [read_json(job.paths.outcome) for job in (one, two)]
    assert outcomes[0]["best_step"] == outcomes[1]["best_step"] < 12
    assert f"validation loss {curve(two)[12]:.4f}\n" in log and "the best so far" in log
    ours, theirs = (load_file(job.paths.adapter / WEIGHTS) for job in (one, two))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def test_the_best_weights_survive_attempts_that_come_after_them(overfitting, monkeypatch):
    """It leaves after a point that is past the best, and goes on from there."""
    whole = overfitting("whole")
    whole.prepare()
    assert whole.train_here() == 0
    best = read_json(whole.paths.outcome)["best_step"]
    job = overfitting("broken")
    job.prepare()
    leave_after(job, best + 2)
    assert job.train_here() == 75
    left = read_json(job.paths.outcome)["step"]
    assert best < left < 12
    job.paths.leave.unlink()
    monkeypatch.setenv("TFSLURM_ATTEMPT", "1")
    job.prepare()
    assert job.train_here() == 0
    assert job.losses == whole.losses and curve(job) == curve(whole)
    assert read_json(job.paths.outcome)["best_step"] == best
    assert (job.paths.adapter / WEIGHTS).read_bytes() == (whole.paths.adapter / WEIGHTS).read_bytes()


def leave_after(job, step):
    def watch():
        while not job.paths.progress.exists() or read_json(job.paths.progress)["step"] < step:
            time.sleep(0.001)
        job.paths.leave.touch()

    threading.Thread(target=watch, daemon=True).start()


def test_a_validation_that_is_interrupted_is_made_by_the_next_attempt(overfitting, monkeypatch):
    """It is asked to leave while it measures after its last step."""
    from tfslurm.training.validation import Validation

    job, measure = overfitting(micro_batch_tokens=60), Validation.measure

    def slow(self, engine, step, interrupted):
        if step == 12:
            job.paths.leave.touch()
        return measure(self, engine, step, interrupted)

    job.prepare()
    with monkeypatch.context() as patched:
        patched.setattr(Validation, "measure", slow)
        assert job.train_here() == 75
    state = resume.read(job.paths.resume)
    assert state.step == 12 and state.measured.step == 10 and list(curve(job)) == [2, 4, 6, 8, 10]
    job.paths.leave.unlink()
    monkeypatch.setenv("TFSLURM_ATTEMPT", "1")
    job.prepare()
    assert job.train_here() == 0
    assert list(curve(job)) == [2, 4, 6, 8, 10, 12] and len(job.metrics) == 12
    assert read_json(job.paths.outcome)["final_validation_loss"] == curve(job)[12]


def test_a_split_is_chosen_by_the_seed_and_never_trained_on(make_job):
    first, again, other = (
        make_job("a", validation_split=0.2),
        make_job("b", validation_split=0.2, epochs=2),
        make_job("c", validation_split=0.2, seed=1),
    )
    kept = []
    for job in (first, again, other):
        job.prepare()
        trained, validated = (set(Plan.load(path).examples) for path in (job.paths.plan, job.paths.validation_plan))
        assert len(validated) == 4 and trained | validated == set(range(20)) and not trained & validated
        kept.append(validated)
    assert kept[0] == kept[1] != kept[2]
    assert first.train_here() == 0
    assert list(curve(first)) == [1, 2, 3] and read_json(first.paths.outcome)["examples"] == 16


def test_the_smallest_split_is_a_row_and_of_a_single_row_there_is_none(make_job):
    job = make_job(validation_split=1e-6)
    job.prepare()
    assert read_json(job.paths.prepared)["validation"]["rows"] == 1
    single = make_job("single", rows=OTHERS[:1], validation_split=0.5)
    assert main([str(single.paths.folder)]) == 5
    assert "a single row to train on" in read_json(single.paths.outcome)["error"]


def test_a_validation_dataset_goes_before_a_split_and_is_tokenized_once(make_job, capsys):
    make_job("one", validation_rows=OTHERS).prepare()
    assert capsys.readouterr().out.count("tokenized in") == 2
    job = make_job("two", validation_rows=OTHERS, validation_split=0.5)
    job.prepare()
    assert "tokenized in" not in capsys.readouterr().out
    assert read_json(job.paths.prepared)["rows"] == 20
    assert read_json(job.paths.prepared)["validation"]["rows"] == len(OTHERS)


def test_validation_rows_that_are_left_out_are_told_and_none_at_all_are_an_error(make_job, capsys):
    short = [talk(0, "b"), talk(0, "b " * 300), {"messages": [{"role": "user", "content": "a"}]}]
    job = make_job(validation_rows=short, overlong="drop")
    job.prepare()
    told = read_json(job.paths.prepared)["validation"]
    assert told["rows"] == 1 and told["dropped"] == {"count": 1, "first": [1]}
    assert [rows["first"] for rows in told["rejected"].values()] == [[2]]
    assert "1 validation rows dropped: 1" in capsys.readouterr().out
    empty = make_job("empty", validation_rows=short[2:])
    assert main([str(empty.paths.folder)]) == 5
    assert "no row of the validation dataset can be trained on" in read_json(empty.paths.outcome)["error"]


def test_the_points_are_spread_evenly_and_the_last_step_is_always_one():
    assert validation_points(100, 5) == [20, 40, 60, 80, 100]
    assert validation_points(7, 3) == [3, 5, 7]
    assert validation_points(3, 5) == [1, 2, 3]
    assert validation_points(9, 1) == [9]
