"""What a running job tells: `progress.json` for views, `metrics.jsonl` for curves, lines for people."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from tfslurm.files import write_atomic


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`progress.json`; `at` is RFC 3339 in UTC."""

    step: int
    steps: int
    epoch: int
    loss: float
    tokens_per_second: float
    eta_seconds: float
    """Without the validations that are left."""
    validation_loss: float | None = None
    """The newest; null as long as there is none."""
    at: str


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of `metrics.jsonl`. Tokens are over all processes; memory is the largest process's."""

    attempt: int
    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    """null where it overflowed."""
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    mfu: float | None
    """The share of the GPUs' peak that the model's own arithmetic took; null where that peak is not known."""
    peak_memory_bytes: int
    at: str
    validation_loss: float | None = None
    """Only where it was measured after this step."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Reporter:
    """Writes both files; the clock is given so that tests need not wait.

    An attempt that goes on after `start` updates keeps the metrics up to there: what an earlier one reported beyond
    is trained once more. Progress tells this attempt's own speed; until there is one, that of the last step kept.
    """

    def __init__(
        self,
        progress: Path,
        metrics: Path,
        *,
        steps: int,
        tokens: int,
        clock: Callable[[], float],
        start: int = 0,
        attempt: int = 0,
        utilization_per_rate: float | None = None,
    ) -> None:
        """`tokens` is how many there are to be trained on from here to the end; see hardware for the last one."""
        self._progress, self._metrics = progress, metrics
        self._steps, self._tokens, self._clock, self._attempt = steps, tokens, clock, attempt
        self._utilization_per_rate = utilization_per_rate
        self._done = 0
        self._rate = 0.0
        self._start = self._last = clock()
        self._validation_loss: float | None = None
        self._newest: StepMetrics | None = None
        kept = _read(metrics, start) if start else []
        if kept:
            write_atomic(metrics, b"".join(_line(line) for line in kept))
            measured = [line.validation_loss for line in kept if line.validation_loss is not None]
            self._validation_loss = measured[-1] if measured else None
            self._newest, self._rate = kept[-1], kept[-1].tokens_per_second
            self._write_progress()
        else:
            metrics.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)

    def sync(self) -> None:
        """Bring the metrics to disk: a state that is saved now must not outlive them."""
        with open(self._metrics, "ab") as file:
            os.fsync(file.fileno())

    def step(
        self,
        step: int,
        *,
        epoch: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        supervised: int,
        peak_memory: int,
    ) -> StepMetrics:
        """Report an update that has just been made; the first is 1."""
        time, at = self._clock(), now()
        seconds = max(time - self._last, 1e-9)
        self._last, self._done = time, self._done + tokens
        metrics = StepMetrics(
            attempt=self._attempt,
            step=step,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=tokens,
            supervised_tokens=supervised,
            tokens_per_second=round(tokens / seconds, 1),
            supervised_tokens_per_second=round(supervised / seconds, 1),
            mfu=self._utilization_per_rate and round(self._utilization_per_rate * tokens / seconds, 4),
            peak_memory_bytes=peak_memory,
            at=at,
        )
        with open(self._metrics, "ab") as file:
            file.write(_line(metrics))
        self._newest, self._rate = metrics, self._done / max(time - self._start, 1e-9)
        progress = self._write_progress()
        print(
            f"step {step}/{self._steps}  epoch {epoch}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  {progress.eta_seconds:,.0f} s left",
            flush=True,
        )
        return metrics

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here takes time that no step is charged for."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self._start, self._last = self._start + seconds, self._last + seconds

    def validated(self, loss: float, *, best: bool) -> None:
        """Add the loss on the validation rows to the step that was reported last."""
        if self._newest is None:
            return  # a state whose metrics are lost
        line = _line(self._newest)
        self._newest, self._validation_loss = msgspec.structs.replace(self._newest, validation_loss=loss), loss
        with open(self._metrics, "r+b") as file:
            file.seek(-len(line), os.SEEK_END)
            file.truncate()
            file.write(_line(self._newest))
        self._write_progress()
        said = ", the best so far" if best else ""
        print(f"step {self._newest.step}/{self._steps}  validation loss {loss:.4f}{said}", flush=True)

    def _write_progress(self) -> Progress:
        metrics = self._newest
        progress = Progress(
            step=metrics.step,
            steps=self._steps,
            epoch=metrics.epoch,
            loss=metrics.loss,
            tokens_per_second=round(self._rate, 1),
            eta_seconds=round((self._tokens - self._done) / max(self._rate, 1e-3), 1),
            validation_loss=self._validation_loss,
            at=metrics.at,
        )
        write_atomic(self._progress, msgspec.json.encode(progress) + b"\n")
        return progress


def _line(metrics: StepMetrics) -> bytes:
    return msgspec.json.encode(metrics) + b"\n"


def _read(path: Path, last: int) -> list[StepMetrics]:
    """The lines up to the step `last`; what follows a line that a crash cut off is left out."""
    kept: list[StepMetrics] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            metrics = msgspec.json.decode(line, type=StepMetrics)
        except msgspec.MsgspecError:
            break
        if metrics.step <= last:
            kept.append(metrics)
    return kept
