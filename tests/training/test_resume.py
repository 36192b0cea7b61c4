from __future__ import annotations

import json
import os
import signal
import threading
import time

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tfslurm.files import read_json
from tfslurm.training import resume
from tfslurm.training.plan import Plan

EPOCHS, STEPS = 8, 24

POINTS = ("resume-begun", "resume-tensors", "resume-named")


class Attempts:
    """Runs a job as the batch script does, attempt after attempt."""

    def __init__(self, job, monkeypatch):
        self.job, self.paths, self.number = job, job.paths, 0
        self._monkeypatch = monkeypatch

    def prepare(self, attempt, world=1):
        self.number = attempt
        for path in (self.paths.leave, self.paths.outcome):
            path.unlink(missing_ok=True)
        self._monkeypatch.setenv("TFSLURM_ATTEMPT", str(attempt))
        self._monkeypatch.setenv("TFSLURM_WORLD_SIZE", str(world))
        self.job.prepare()

    def leave_after(self, step):
        """Ask it to leave once it has reported `step`."""

        def watch():
            while not self.paths.progress.exists() or read_json(self.paths.progress)["step"] < step:
                time.sleep(0.001)
            self.paths.leave.touch()

        threading.Thread(target=watch, daemon=True).start()

    def run(self, world):
        """The exit code of an attempt on `world` processes."""
        return self.job.train_here() if world == 1 else self.job.run(world)[0]

    def interrupted_here(self, step=5):
        """One attempt that leaves; returns the step from which the next one goes on."""
        self.leave_after(step)
        assert self.job.train_here() == 75, read_json(self.paths.outcome)
        return self.suspended()

    def suspended(self):
        outcome = read_json(self.paths.outcome)
        assert outcome["result"] == "suspended" and outcome["attempt"] == self.number, outcome
        assert read_json(self.paths.resume / "state.json")["step"] == outcome["step"] < STEPS
        return outcome["step"]


@pytest.fixture
def attempts(make_job, monkeypatch):
    def make(name="job", **options):
        return Attempts(make_job(name, **dict(epochs=EPOCHS, learning_rate=5e-3) | options), monkeypatch)

    return make


@pytest.fixture
def uninterrupted(make_job):
    def train(**options):
        job = make_job("uninterrupted", **dict(epochs=EPOCHS, learning_rate=5e-3) | options)
        job.prepare()
        assert job.train_here() == 0
        return job

    return train


OPTIONS = [
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"dtype": "bfloat16"},
    {"lora_dropout": 0.1},
    {"weight_decay": 0.1, "gradient_checkpointing": True, "lora_dropout": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_job_that_was_interrupted_twice_trains_as_one_that_was_not(attempts, uninterrupted, options):
    whole = uninterrupted(**options)
    job = attempts(**options)
    steps = []
    for attempt, step in enumerate((4, 12)):
        job.prepare(attempt)
        steps.append(job.interrupted_here(step))
    job.prepare(2)
    assert job.job.train_here() == 0
    assert job.job.losses == whole.losses
    compared = ("step", "learning_rate", "grad_norm", "tokens", "epoch")
    assert [[line[key] for key in compared] for line in job.job.metrics] == [
        [line[key] for key in compared] for line in whole.metrics
    ]
    assert [line["attempt"] for line in job.job.metrics] == [
        0 if line["step"] <= steps[0] else 1 if line["step"] <= steps[1] else 2 for line in whole.metrics
    ]
    name = "adapter_model.safetensors"
    assert (job.paths.adapter / name).read_bytes() == (whole.paths.adapter / name).read_bytes()
    outcome = read_json(job.paths.outcome)
    assert (outcome["result"], outcome["attempt"], outcome["steps"]) == ("succeeded", 2, STEPS)
    assert outcome["final_loss"] == whole.losses[-1]


@pytest.mark.parametrize(("stage", "before", "after"), [(1, 2, 1), (2, 1, 2), (3, 1, 3)])
def test_a_job_goes_on_with_another_number_of_processes(attempts, uninterrupted, stage, before, after):
    """Three processes do not divide the adapter's matrices evenly; a state is saved at every other step or so."""
    whole = uninterrupted(zero_stage=stage)
    job = attempts(zero_stage=stage, world=before, save_minutes=0.001)
    job.prepare(0, before)
    first = Plan.load(job.paths.plan)
    job.leave_after(5)
    assert job.run(before) == 75
    step = job.suspended()
    assert 5 <= step == len(job.job.metrics)
    job.prepare(1, after)
    second = Plan.load(job.paths.plan)
    assert (first.world_size, second.world_size) == (before, after)
    assert all(set(first.examples_of(s)) == set(second.examples_of(s)) for s in range(STEPS))
    assert job.run(after) == 0
    assert job.job.losses == pytest.approx(whole.losses, abs=1e-3)
    assert [line["step"] for line in job.job.metrics] == list(range(1, STEPS + 1))


def test_a_preempted_process_makes_all_of_them_leave(attempts):
    """The second of two gets SIGTERM; the others of its own output are in a log of its own."""
    job = attempts(epochs=2000, world=2)
    job.prepare(3, 2)
    port = job.job.free_port()
    processes = [job.job.start(rank, 2, port) for rank in range(2)]
    while not job.paths.progress.exists() and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 0], logs
    outcome = read_json(job.paths.outcome)
    assert outcome["result"] == "suspended" and outcome["steps_made"] == outcome["step"] == len(job.job.metrics)
    assert logs[1] == "" and job.paths.rank_log(3, 1).exists()


def test_a_job_that_has_to_leave_before_its_first_step_saves_nothing_and_says_so(attempts):
    job = attempts()
    job.prepare(0)
    job.paths.leave.touch()
    assert job.job.train_here() == 76
    assert read_json(job.paths.outcome) == {"result": "suspended", "step": 0, "steps_made": 0, "attempt": 0}
    assert not job.paths.resume.exists()


def test_an_attempt_that_adds_nothing_leaves_the_state_of_the_one_before(attempts):
    job = attempts()
    job.prepare(0)
    step = job.interrupted_here()
    state = (job.paths.resume / "state.json").read_bytes()
    job.prepare(1)
    job.paths.leave.touch()
    assert job.job.train_here() == 76
    assert read_json(job.paths.outcome) == {"result": "suspended", "step": step, "steps_made": 0, "attempt": 1}
    assert (job.paths.resume / "state.json").read_bytes() == state
    assert len(job.job.metrics) == step


def test_a_stop_wins_over_a_leave_and_saves_nothing(attempts):
    job = attempts()
    job.prepare(0)
    job.paths.leave.touch()
    job.paths.stop.touch()
    assert job.job.train_here() == 0
    assert read_json(job.paths.outcome)["result"] == "stopped" and not job.paths.resume.exists()


def test_progress_stands_where_it_was_from_the_first_moment_on(attempts):
    job = attempts()
    job.prepare(0)
    step = job.interrupted_here()
    job.prepare(1)
    job.paths.leave.touch()
    assert job.job.train_here() == 76
    progress = read_json(job.paths.progress)
    assert (progress["step"], progress["loss"]) == (step, job.job.losses[-1])
    assert progress["tokens_per_second"] > 0 and progress["eta_seconds"] > 0


def start(job, **more):
    return job.job.start(0, 1, job.job.free_port(), **more)


def test_killed_anywhere_in_a_saving_the_job_goes_on_from_a_whole_state(attempts, uninterrupted):
    """A state after every step: the third saving of the first attempt is the one that is killed."""
    whole = uninterrupted()
    job = attempts(save_minutes=1e-9)
    job.prepare(0)
    step = job.interrupted_here(3)
    for attempt, point in enumerate(POINTS, start=1):
        job.prepare(attempt)
        killed = start(job, TFSLURM_FAULT=point)
        log = killed.communicate(timeout=120)[0]
        assert killed.returncode == -signal.SIGKILL, log
        assert not job.paths.outcome.exists() and not job.paths.adapter.exists()
        state = resume.read(job.paths.resume)
        assert state.step == step + (point == "resume-named"), point
        assert resume.usable(job.paths.resume, state.basis) == state
        assert len(job.job.metrics) == step + 1
    job.prepare(4)
    assert job.job.train_here() == 0
    assert job.job.losses == whole.losses
    assert [line["attempt"] for line in job.job.metrics][step - 1 : step + 2] == [0, 3, 4]
    assert len(list(job.paths.resume.iterdir())) == 2


def test_a_state_that_cannot_be_written_costs_no_step_of_the_training(attempts, capfd):
    job = attempts(save_minutes=1e-9)
    job.prepare(0)
    job.paths.resume.symlink_to("nowhere")
    assert job.job.train_here() == 0
    assert len(job.job.metrics) == STEPS
    assert "could not be saved: [Errno 17] File exists" in capfd.readouterr().out


def damage_tensors(folder):
    (path,) = folder.glob("*.safetensors")
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\x00\x01\x02")


def remove_tensors(folder):
    next(folder.glob("*.safetensors")).unlink()


def damage_json(folder):
    (folder / "state.json").write_text('{"step": 5')


@pytest.mark.parametrize("damage", [damage_tensors, remove_tensors, damage_json])
def test_a_damaged_state_is_told_and_the_job_starts_again(attempts, uninterrupted, capfd, damage):
    whole = uninterrupted()
    job = attempts()
    job.prepare(0)
    job.interrupted_here()
    damage(job.paths.resume)
    job.prepare(1)
    assert job.job.train_here() == 0
    assert "WARNING: the saved state is damaged" in capfd.readouterr().out
    assert job.job.losses == whole.losses and {line["attempt"] for line in job.job.metrics} == {1}


CHANGES = [
    ({"seed": 3}, "its seed is 0, and the job's is 3"),
    ({"lora_rank": 8}, "its lora_rank is 4, and the job's is 8"),
    ({"learning_rate": 0.25}, "its learning_rate is 0.005, and the job's is 0.25"),
    ({"epochs": 9}, "its epochs is 8, and the job's is 9"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=str)
def test_a_state_of_another_run_is_refused_by_name(attempts, change, said):
    job, other = attempts(), attempts("other", **change)
    job.prepare(0)
    job.interrupted_here()
    other.prepare(1)
    job.paths.resume.rename(other.paths.resume)
    assert other.job.train_here() == 5
    assert said in read_json(other.paths.outcome)["error"]
    assert not other.paths.metrics.exists() and (other.paths.resume / "state.json").exists()


def test_a_state_on_other_bytes_is_refused(attempts):
    job = attempts()
    job.prepare(0)
    job.interrupted_here()
    path = job.paths.resume / "state.json"
    for field in ("dataset_digest", "base_model_revision", "base_model_digest"):
        state = read_json(path)
        state["basis"][field] = "another"
        path.write_text(json.dumps(state))
        assert job.job.train_here() == 5
        assert f"its {field} is another, and the job's is" in read_json(job.paths.outcome)["error"]
        job.paths.outcome.unlink()
        state["basis"][field] = msgspec.to_builtins(resume.Basis.of(job.job.config, STEPS))[field]
        path.write_text(json.dumps(state))


def test_a_state_whose_tensors_are_not_the_model_s_is_refused(attempts):
    job = attempts()
    job.prepare(0)
    job.interrupted_here()
    state = resume.read(job.paths.resume)
    tensors = load_file(job.paths.resume / state.tensors)
    lost = min(tensors)
    del tensors[lost]
    resume.save(job.paths.resume, state, tensors)
    assert job.job.train_here() == 5
    assert f"the saved state and the model differ in {lost}" in read_json(job.paths.outcome)["error"]


def test_a_state_holds_the_trained_parameters_and_their_moments_alone(attempts):
    job = attempts()
    job.prepare(0)
    step = job.interrupted_here()
    state = resume.read(job.paths.resume)
    tensors = load_file(job.paths.resume / state.tensors)
    assert {name.split("/")[0] for name in tensors} == {"master", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    trained = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("master/"))
    assert state.size == pytest.approx(3 * 4 * trained, rel=0.5) and state.updates == step
    assert all("lora_" in name for name in tensors)


def test_an_attempt_after_a_success_keeps_it(attempts, capfd):
    job = attempts(epochs=1)
    job.prepare(0)
    assert job.job.train_here() == 0
    kept = [path.read_bytes() for path in (job.paths.outcome, job.paths.metrics)]
    job.job.prepare()
    assert job.job.train_here() == 0
    assert capfd.readouterr().out.count("an earlier attempt has succeeded") == 2
    assert [path.read_bytes() for path in (job.paths.outcome, job.paths.metrics)] == kept


def basis(**changes):
    from tfslurm.training.config import Hyperparameters

    numbers = dict(learning_rate=1e-3, epochs=1, effective_batch_size=8, max_seq_length=9, lora_rank=4, lora_alpha=8)
    same = dict(dataset_digest="d", base_model_revision="r", base_model_digest="b", seed=0, steps=10)
    return resume.Basis(hyperparameters=Hyperparameters(**numbers), **same | changes)


def write(folder, attempt, step):
    state = resume.State(
        attempt=attempt, step=step, loss=1.0, peak_memory_bytes=1, updates=step, world_size=1, basis=basis()
    )
    return resume.save(folder, state, {"a": torch.zeros(3)})


def test_attempts_that_saved_nothing_are_counted_from_the_last_that_did(tmp_path):
    folder = tmp_path / "resume"
    assert [resume.barren(folder, attempt) for attempt in range(3)] == [0, 1, 2]
    write(folder, 2, 5)
    assert [resume.barren(folder, attempt) for attempt in (3, 4, 5)] == [0, 1, 2]


def test_what_a_killed_saving_left_is_swept_by_the_next(tmp_path):
    folder = tmp_path / "resume"
    write(folder, 0, 5)
    save_file({"a": torch.zeros(3)}, folder / "attempt-1-step-9.safetensors")
    (folder / ".state.json.abc").touch()
    write(folder, 2, 7)
    assert sorted(path.name for path in folder.iterdir()) == ["attempt-2-step-7.safetensors", "state.json"]
