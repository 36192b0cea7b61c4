"""The curves of jobs: their metrics, read from what the trainer wrote, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

METRICS = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "supervised_tokens_per_second": "supervised tokens/s",
    "peak_memory_bytes": "peak memory (GiB)",
}
"""What can be drawn over the steps, and what it is called there."""

EXACT = frozenset({"learning_rate"})
"""What is no measurement, and is never smoothed."""

SCALES = {"peak_memory_bytes": 2**30}
"""What a metric's values are divided by."""

CHECKED = {"loss": "validation_loss"}
"""What is measured of a metric now and then, on rows that are not trained on."""

Point = tuple[int, float]
"""A step, and the value after it."""


@dataclass(frozen=True)
class Line:
    """One job's metric; the steps rise, and every value is finite."""

    label: str
    points: list[Point]
    raw: list[Point]
    """The same before it was smoothed."""
    checks: list[Point]
    """What was measured now and then."""


@dataclass(frozen=True)
class Chart:
    """A metric of one job or several."""

    metric: str
    lines: list[Line]

    @property
    def drawn(self) -> list[Point]:
        """Every point of every line."""
        return [point for line in self.lines for point in (*line.points, *line.checks)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of every step, in their order; none where there is no file yet.

    Where an attempt trained steps again that one before it had reported, the later ones count. A line that is just
    being written, or that a crash cut off, is left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        while steps and next(reversed(steps)) > line["step"]:
            steps.popitem()
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return list(steps.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # it is told again by the attempt that goes on


def chart_of(metric: str, jobs: Iterable[tuple[str, list[dict[str, Any]]]], smooth: int = 1) -> Chart:
    """The chart of a metric for jobs, each a label and its metrics; jobs that have none of it are left out.

    With `smooth`, each value is the mean of the last so many steps, as far as there are.
    """
    lines = []
    for label, metrics in jobs:
        scale = SCALES.get(metric, 1)
        raw, checks = _points(metrics, metric, scale), _points(metrics, CHECKED.get(metric), scale)
        if raw or checks:
            lines.append(Line(label, raw if metric in EXACT else smoothed(raw, smooth), raw, checks))
    return Chart(metric, lines)


def _points(metrics: list[dict[str, Any]], name: str | None, scale: float) -> list[Point]:
    # JSON has no NaN: where a value was none, there is null.
    found = ((line["step"], line.get(name)) for line in metrics)
    return [(step, value / scale) for step, value in found if value is not None and math.isfinite(value)]


def smoothed(points: list[Point], window: int) -> list[Point]:
    """Each value as the mean of itself and those before it, `window` of them in all."""
    if window <= 1:
        return points
    sums = [0.0, *accumulate(value for _, value in points)]
    starts = (max(0, index + 1 - window) for index in range(len(points)))
    return [
        (step, (sums[index + 1] - sums[start]) / (index + 1 - start))
        for (index, (step, _)), start in zip(enumerate(points), starts, strict=True)
    ]
