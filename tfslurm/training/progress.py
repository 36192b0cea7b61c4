"""What a running job tells: `progress.json` for views, `metrics.jsonl` for curves, lines for people."""

from __future__ import annotations

from collections.abc import Callable
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
    at: str


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `metrics.jsonl`. Tokens and memory are over all processes; memory is the largest process's."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    peak_memory_bytes: int
    at: str


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Reporter:
    """Writes both files; the clock is given so that tests need not wait."""

    def __init__(self, progress: Path, metrics: Path, *, steps: int, tokens: int, clock: Callable[[], float]) -> None:
        """`tokens` is how many there are to be trained on from here to the end."""
        self._progress, self._metrics = progress, metrics
        self._steps, self._tokens, self._clock = steps, tokens, clock
        self._done = 0
        self._start = self._last = clock()
        metrics.unlink(missing_ok=True)
        progress.unlink(missing_ok=True)

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
    ) -> None:
        """Report an update that has just been made; the first is 1."""
        time, at = self._clock(), now()
        seconds = max(time - self._last, 1e-9)
        self._last, self._done = time, self._done + tokens
        metrics = StepMetrics(
            step=step,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=tokens,
            supervised_tokens=supervised,
            tokens_per_second=round(tokens / seconds, 1),
            supervised_tokens_per_second=round(supervised / seconds, 1),
            peak_memory_bytes=peak_memory,
            at=at,
        )
        with open(self._metrics, "ab") as file:
            file.write(msgspec.json.encode(metrics) + b"\n")
        self._write_progress(metrics, max(time - self._start, 1e-9))

    def _write_progress(self, metrics: StepMetrics, elapsed: float) -> None:
        rate = self._done / elapsed
        progress = Progress(
            step=metrics.step,
            steps=self._steps,
            epoch=metrics.epoch,
            loss=metrics.loss,
            tokens_per_second=round(rate, 1),
            eta_seconds=round((self._tokens - self._done) / rate, 1),
            at=metrics.at,
        )
        write_atomic(self._progress, msgspec.json.encode(progress) + b"\n")
        print(
            f"step {progress.step}/{progress.steps}  epoch {progress.epoch}  loss {progress.loss:.4f}  "
            f"lr {metrics.learning_rate:.2e}  {metrics.tokens_per_second:,.0f} tokens/s  "
            f"{progress.eta_seconds:,.0f} s left",
            flush=True,
        )
