"""Where a job's metrics go besides its folder: TensorBoard, Weights & Biases, MLflow, each through its own client.

The clients are imported on the node alone, and only those that the site configured. A tracker that fails is told in
the log once, and does without from then on: it never costs the job a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from tfslurm.training.config import TrainingConfig
from tfslurm.training.progress import StepMetrics

SHOWN = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens_per_second": "speed/tokens_per_second",
    "supervised_tokens_per_second": "speed/supervised_tokens_per_second",
    "mfu": "speed/mfu",
    "peak_memory_bytes": "memory/peak_bytes",
}
"""What trackers get of a step, and what it is called there."""


class Tracker(Protocol):
    """One of them, for one job."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All that the site configured. An attempt that goes on writes where the one before it did."""

    def __init__(self, config: TrainingConfig, folder: Path, start: int) -> None:
        """`folder` is for those that keep files; `start` is how many steps were made before."""
        self._alive: dict[str, Tracker] = {}
        for name in config.trackers.use:
            self._guarded(name, lambda name=name: self._alive.update({name: KINDS[name](config, folder / name, start)}))

    def step(self, metrics: StepMetrics) -> None:
        told = msgspec.structs.asdict(metrics)
        self._log(metrics.step, {SHOWN[key]: float(told[key]) for key in SHOWN if told[key] is not None})

    def validated(self, step: int, loss: float) -> None:
        """Tell the loss on the validation rows after `step`."""
        self._log(step, {"validation/loss": loss})

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._alive.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, values))

    def close(self) -> None:
        """Bring to disk or to the server what is left."""
        for name, tracker in list(self._alive.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            # Whatever a client throws: it is not worth the job.
            print(f"WARNING: {name} gets no more metrics: {type(error).__name__}: {error}", flush=True)
            self._alive.pop(name, None)


class TensorBoard:
    """Event files; steps that are trained once more replace those of the attempt before."""

    def __init__(self, config: TrainingConfig, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run whose id is the job's; offline, each attempt is a folder for `wandb sync`."""

    def __init__(self, config: TrainingConfig, folder: Path, start: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        site = config.trackers.wandb
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=site.project,
            entity=site.entity,
            mode=site.mode,
            dir=str(folder),
            id=config.job_id,
            name=config.name,
            resume="allow" if site.mode == "online" else None,
            config=_described(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of the site's experiment; an attempt that goes on finds the job's by its tag."""

    def __init__(self, config: TrainingConfig, folder: Path, start: int) -> None:
        uri = config.trackers.mlflow.uri
        if uri is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # MLflow would rather have SQLite, whose locks not every shared filesystem has.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            uri = folder.absolute().as_uri()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._run = self._run_of(config)

    def _run_of(self, config: TrainingConfig) -> str:
        name = config.trackers.mlflow.experiment
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.tfslurm_job = '{config.job_id}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        run = self._client.create_run(experiment, run_name=config.name, tags={"tfslurm_job": config.job_id})
        for key, value in _described(config).items():
            self._client.log_param(run.info.run_id, key, value)
        return run.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        at = get_current_time_millis()
        metrics = [Metric(name, value, at, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _described(config: TrainingConfig) -> dict[str, str | int | float]:
    return msgspec.to_builtins(config.hyperparameters) | {
        "seed": config.seed,
        "base_model": f"{config.base_model.name}@{config.base_model.revision}",
        "dataset": f"{config.dataset.name} {config.dataset.digest}",
    }


KINDS: dict[str, Callable[[TrainingConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
