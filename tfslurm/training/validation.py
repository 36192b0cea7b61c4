"""The loss on rows that are not trained on, and the weights of the step after which it was lowest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from tfslurm.errors import InvalidError
from tfslurm.training import caps, masters
from tfslurm.training.batches import micro_batch
from tfslurm.training.plan import Plan
from tfslurm.training.prepared import PreparedValidation
from tfslurm.training.ranks import Rank
from tfslurm.training.resume import Measured
from tfslurm.training.tokens import TokenFile

BEST = "best/"
"""What the best weights' names begin with in a saved state."""


class Validation:
    """Measures at the steps that were planned. Its methods are called by every process; the first keeps the weights.

    The processes share the rows; the loss is the sum over all supervised tokens, divided by their number, so that it
    is the same for any number of processes.
    """

    def __init__(self, prepared: PreparedValidation, rank: Rank, limit: int, capacity: int) -> None:
        self.points = frozenset(prepared.points)
        self.measured: Measured | None = None
        self._rank, self._limit = rank, limit
        self._tokens = TokenFile(Path(prepared.tokens))
        self._plan = Plan.load(Path(prepared.plan))
        if capacity < self._plan.capacity:
            self._plan = self._plan.repacked(np.minimum(self._tokens.lengths, limit), capacity)
        self._best: dict[str, torch.Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether the loss after `step` updates is planned, and not measured yet."""
        return step in self.points and (self.measured is None or self.measured.step < step)

    def measure(
        self,
        engine,
        step: int,
        interrupted: Callable[[], bool],
    ) -> Measured | None:
        """The loss after `step` updates, in evaluation mode; None where it was interrupted, and has to be made anew.

        Raises InvalidError where the loss is not finite, OutOfMemory where a micro-batch does not fit.
        """
        engine.eval()
        try:
            loss = self._loss(engine, interrupted)
        finally:
            engine.train()
        if loss is None:
            return None
        if not np.isfinite(loss):
            raise InvalidError(
                f"the validation loss became {loss} at step {step}",
                hint="lower the learning rate, or look at the validation rows",
            )
        before = self.measured
        if before is None or loss < before.best_loss:
            self._best = masters.gather_weights(engine, keep=self._rank.first)
            self.measured = Measured(step=step, loss=loss, best_step=step, best_loss=loss)
        else:
            best = {"best_step": before.best_step, "best_loss": before.best_loss}
            self.measured = Measured(step=step, loss=loss, **best)
        return self.measured

    @torch.no_grad()
    def _loss(self, engine, interrupted: Callable[[], bool]) -> float | None:
        total = 0.0
        for examples in self._plan.micro_batches(0, self._rank.rank):
            if interrupted():
                return None
            batch = micro_batch(self._tokens, examples, self._limit, engine.device)
            with caps.fitting(batch):
                total += engine(batch).item()
        value = torch.tensor([total], dtype=torch.float64, device=engine.device)
        distributed.all_reduce(value)
        # All must agree to the last digit on which is the lowest.
        distributed.broadcast(value, src=0)
        return value.item() / float(self._plan.supervised[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The best weights, to be saved with a state: in the first process, once there are any."""
        return {BEST + name: tensor for name, tensor in self._best.items()}

    def restore(self, measured: Measured | None, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from a state that was saved; only the first process has tensors."""
        self.measured = measured
        self._best = {name.removeprefix(BEST): tensor for name, tensor in tensors.items()}

    def put_best(self, engine) -> None:
        """Give the module the weights of the best step; the optimizer's masters stay as they are."""
        if self.measured and self.measured.best_step < self.measured.step:
            masters.set_weights(engine, self._best if self._rank.first else None)
