"""What the first process tells while a job trains: metrics, progress and lines, and the site's trackers."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from tfslurm.paths import JobPaths
from tfslurm.training.config import TrainingConfig
from tfslurm.training.hardware import utilization_per_rate
from tfslurm.training.progress import Reporter
from tfslurm.training.resume import Measured
from tfslurm.training.trackers import Trackers

if TYPE_CHECKING:
    from tfslurm.training.plan import Plan


class Reports:
    """Of one attempt, which begins after the step `start`."""

    def __init__(
        self, paths: JobPaths, config: TrainingConfig, plan: Plan, engine, *, start: int, attempt: int
    ) -> None:
        self._plan, self._engine = plan, engine
        self._reporter = Reporter(
            paths.progress,
            paths.metrics,
            steps=plan.steps,
            tokens=int(plan.tokens[start:].sum()),
            clock=time.monotonic,
            start=start,
            attempt=attempt,
            utilization_per_rate=_utilization_per_rate(engine, plan.world_size),
        )
        self._trackers = Trackers(config, paths.trackers, start)

    def step(self, step: int, *, loss: float, learning_rate: float, peak_memory: int) -> None:
        """Tell of an update that has just been made; the first is 1."""
        index, norm = step - 1, self._engine.get_global_grad_norm()
        metrics = self._reporter.step(
            step,
            epoch=int(self._plan.epoch[index]),
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=float(norm) if norm is not None else float("nan"),
            tokens=int(self._plan.tokens[index]),
            supervised=int(self._plan.supervised[index]),
            peak_memory=peak_memory,
        )
        self._trackers.step(metrics)

    def validated(self, measured: Measured) -> None:
        """Tell of the loss on the validation rows after the step that was told of last."""
        self._reporter.validated(measured.loss, best=measured.best_step == measured.step)
        self._trackers.validated(measured.step, measured.loss)

    def aside(self) -> AbstractContextManager:
        """What is done in here takes time that no step is charged for."""
        return self._reporter.aside()

    def sync(self) -> None:
        """Bring the metrics to disk: a state that is saved now must not outlive them."""
        self._reporter.sync()

    def close(self) -> None:
        self._trackers.close()


def _utilization_per_rate(engine, world_size: int) -> float | None:
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    frozen = (parameter for parameter in engine.module.parameters() if not parameter.requires_grad)
    # Under ZeRO-3 a parameter is elsewhere most of the time, and says how large it is there.
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in frozen)
    return utilization_per_rate(parameters, gpu, world_size)
