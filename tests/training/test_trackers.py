from __future__ import annotations

import importlib.util
import sys

import pytest

from tfslurm.files import read_json
from tfslurm.training.progress import StepMetrics
from tfslurm.training.trackers import Trackers


def needs(client):
    if importlib.util.find_spec(client) is None:
        pytest.skip(f"{client.upper()} IS NOT TESTED: install tfslurm[{client}] beside tfslurm[train]")


def metrics(step):
    return StepMetrics(
        attempt=0, step=step, epoch=1, loss=1 / step, learning_rate=1e-3, grad_norm=None, tokens=10,
        supervised_tokens=5, tokens_per_second=2.0, supervised_tokens_per_second=1.0, mfu=None, peak_memory_bytes=1,
        at="2026-01-01T00:00:00Z",
    )  # fmt: skip


def report(config, folder, first, last, validated=()):
    trackers = Trackers(config, folder, first - 1)
    for step in range(first, last + 1):
        trackers.step(metrics(step))
        if step in validated:
            trackers.validated(step, 2 / step)
    trackers.close()


def test_a_job_writes_what_tensorboard_reads(make_job):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(trackers=("tensorboard",), validation_split=0.2)
    job.prepare()
    assert job.train_here() == 0
    events = EventAccumulator(str(job.paths.trackers / "tensorboard")).Reload()
    for tag, key in (("train/loss", "loss"), ("validation/loss", "validation_loss"), ("train/grad_norm", "grad_norm")):
        told = [(line["step"], pytest.approx(line[key], rel=1e-5)) for line in job.metrics]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == told
    assert "speed/mfu" not in events.Tags()["scalars"]


def test_steps_that_are_trained_again_are_in_tensorboard_once(make_job, tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_job(trackers=("tensorboard",)).config
    report(config, tmp_path, 1, 6)
    report(config, tmp_path, 4, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7]


def test_mlflow_keeps_one_run_through_all_attempts(make_job, tmp_path, monkeypatch):
    needs("mlflow")
    from mlflow import MlflowClient

    config = make_job(trackers=("mlflow",)).config
    report(config, tmp_path, 1, 3, validated=[2])
    report(config, tmp_path, 4, 5)
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("tfslurm").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "job" and run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.01" and run.data.params["base_model"] == "tiny@main"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    (point,) = client.get_metric_history(run.info.run_id, "validation/loss")
    assert (point.step, point.value) == (2, 1.0)


def test_wandb_writes_an_offline_run_of_the_job_s_id(make_job, tmp_path, until, capsys):
    needs("wandb")
    config = make_job(trackers=("wandb",)).config
    report(config, tmp_path, 1, 3, validated=[2])
    (written,) = (tmp_path / "wandb").glob("wandb/offline-run-*/run-job.wandb")
    assert "WARNING" not in capsys.readouterr().out
    until(lambda: b"validation/loss" in written.read_bytes())
    assert b"train/loss" in written.read_bytes()


def test_a_client_that_is_missing_is_told_and_the_job_goes_on(make_job, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    job = make_job(trackers=("wandb",))
    job.prepare()
    assert job.train_here() == 0
    assert capfd.readouterr().out.count("WARNING: wandb gets no more metrics: ModuleNotFoundError") == 1
    assert read_json(job.paths.outcome)["result"] == "succeeded" and not job.paths.trackers.exists()


def test_a_tracker_that_breaks_halfway_is_told_once_and_the_others_go_on(make_job, tmp_path, capsys, monkeypatch):
    from tfslurm.training import trackers

    class Recording:
        def __init__(self, config, folder, start):
            self.steps = told.setdefault(folder.name, [])

        def log(self, step, values):
            self.steps.append(step)
            if "wandb" in told and self.steps is told["wandb"] and step == 2:
                raise ConnectionError("the server is gone")

        def close(self):
            self.steps.append("closed")

    told = {}
    monkeypatch.setattr(trackers, "KINDS", {"wandb": Recording, "mlflow": Recording})
    report(make_job(trackers=("wandb", "mlflow")).config, tmp_path, 1, 3)
    assert told == {"wandb": [1, 2], "mlflow": [1, 2, 3, "closed"]}
    said = "WARNING: wandb gets no more metrics: ConnectionError: the server is gone\n"
    assert capsys.readouterr().out == said


def test_no_client_is_imported_that_no_one_asked_for(make_job, tmp_path):
    report(make_job().config, tmp_path, 1, 2)
    assert not list(tmp_path.glob("tensorboard*")) and not (tmp_path / "wandb").exists()
