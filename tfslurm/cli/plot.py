"""Curves, drawn with letters and dots in the terminal, or as a picture."""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfslurm.catalog.models import Job
from tfslurm.errors import InvalidError, StatusError, UsageError
from tfslurm.files import write_atomic
from tfslurm.paths import Root
from tfslurm.training.curves import CHECKED, METRICS, Chart, Line, Point, chart_of, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLANK = "\N{BRAILLE PATTERN BLANK}"

COLORS = ("cyan", "yellow", "magenta", "green", "red", "blue")

MOST = 40
"""Jobs in one picture."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"

APART = 16
"""Columns between two letters on a line."""

STYLES = ("-", "--", ":", "-.")
"""Of a picture's lines: there are ten colours."""

MARGIN = 11
"""Columns left of the axis."""


def draw(chart: Chart, width: int, height: int, color: bool) -> str:
    """The chart as lines of text: `width` columns, and `height` rows without title, axis and legend.

    Of several jobs each has a letter, small on its line and large where its validation loss was measured: without
    colours, nothing else tells them apart.
    """
    from plotille import Canvas  # late: only drawing needs it

    first, last, low, high = _limits(chart)
    columns = max(20, width - MARGIN - 2)
    # The canvas ends before its upper limits: the last step is to be in its last column of dots.
    canvas = Canvas(columns, height, first, low, first + (last - first) * 2 * columns / (2 * columns - 1), high)
    several = len(chart.lines) > 1
    for number, line in enumerate(chart.lines):
        shade = COLORS[number % len(COLORS)] if color else None
        for start, end in zip(line.points, line.points[1:] or line.points, strict=False):
            canvas.line(*start, *end, color=shade)
        for step, value in _marked(line, first, last, columns) if several else ():
            canvas.point(step, value, color=shade, marker=_letter(number))
        for step, value in line.checks:
            canvas.point(step, value, color=shade, marker=_letter(number).upper() if several else "o")
    rows = canvas.plot(linesep="\n").split("\n")
    labels = _labels(low, high, height)
    body = [f"{label:>{MARGIN - 1}} │{row.rstrip(BLANK)}" for label, row in zip(labels, rows, strict=True)]
    legend = _legend(chart, color)
    return "\n".join([METRICS[chart.metric], *body, *_axis(first, last, columns), *legend])


def _limits(chart: Chart) -> tuple[float, float, float, float]:
    """The first and the last step, and the smallest and the largest value, with room between them and the frame."""
    steps, values = [step for step, _ in chart.drawn], [value for _, value in chart.drawn]
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return min(steps), max(*steps, min(steps) + 1), low - room, high + room


def _letter(number: int) -> str:
    return LETTERS[number % len(LETTERS)]


def _marked(line: Line, first: float, last: float, columns: int) -> Iterator[tuple[int, float]]:
    """The points of a line that get its letter: about every APART columns, and the last one."""
    gap, due = (last - first) / columns * APART, first
    for step, value in line.points:
        if step >= due or (step, value) == line.points[-1]:
            yield step, value
            due = step + gap


def _labels(low: float, high: float, height: int) -> list[str]:
    """What stands left of each row, the highest first: a round value where one lies in the row."""
    row, ticks = (high - low) / height, round_values(low, high, max(2, height // 4))
    found = [next((tick for tick in ticks if start <= tick < start + row), None) for start in _starts(low, row, height)]
    return ["" if tick is None else _said(tick) for tick in reversed(found)]


def _starts(low: float, row: float, height: int) -> Iterator[float]:
    return (low + row * number for number in range(height))


def round_values(low: float, high: float, count: int) -> list[float]:
    """About `count` values between `low` and `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _said(value: float) -> str:
    return f"{value:,.6g}" if abs(value) < 1e9 else f"{value:.3g}"


def _axis(first: float, last: float, columns: int) -> list[str]:
    line, below = ["─"] * columns, [" "] * columns
    for tick in round_values(first, last, max(2, columns // 16)):
        at, text = round((tick - first) / (last - first) * (columns - 1)), f"{round(tick):,}"
        start = min(max(0, at - len(text) // 2), columns - len(text))
        if tick == round(tick) and "".join(below[max(0, start - 1) : start + len(text) + 1]).strip() == "":
            line[at] = "┬"
            below[start : start + len(text)] = text
    return [f"{' ' * MARGIN}└{''.join(line)}", f"{'step':>{MARGIN - 1}}  {''.join(below).rstrip()}"]


def _legend(chart: Chart, color: bool) -> list[str]:
    from plotille import color as painted

    checked = CHECKED.get(chart.metric, "").replace("_", " ")
    if len(chart.lines) == 1:
        return [f"{' ' * MARGIN} o {checked}"] if chart.lines[0].checks else []
    lines = []
    for number, line in enumerate(chart.lines):
        shade = COLORS[number % len(COLORS)] if color else None
        also = f"  ({_letter(number).upper()}: {checked})" if line.checks else ""
        lines.append(f"{' ' * MARGIN} {painted(_letter(number), fg=shade, no_color=not color)} {line.label}{also}")
    return lines


def charts_of(root: Root, jobs: Sequence[Job], metrics: Sequence[str], smooth: int) -> list[Chart]:
    """A chart for each metric, of all the jobs that have it.

    Raises InvalidError for too many jobs, StatusError where no job has such a metric.
    """
    if len(jobs) > MOST:
        raise InvalidError(
            f"these are {len(jobs)} jobs, and one picture holds {MOST}", hint="Name the jobs to compare."
        )
    told = [(job.name, read_metrics(root.job(job.id).metrics)) for job in jobs]
    charts = [chart_of(metric, told, smooth) for metric in metrics]
    for empty in (each for each in charts if not each.lines):
        names = ", ".join(name for name, _ in told)
        raise StatusError(f"{names}: no {METRICS[empty.metric]} is known yet", hint="It comes with the first step.")
    return charts


def show(charts: list[Chart]) -> str:
    """The charts as text, as wide as the terminal, with colours where there is one."""
    columns, rows = shutil.get_terminal_size()
    height = max(8, min(20, (rows - 3) // len(charts) - 4))
    return "\n\n".join(draw(each, columns, height, sys.stdout.isatty()) for each in charts)


def picture(charts: list[Chart], path: Path) -> None:
    """Write the charts, one below the other, as a PNG; an earlier file is replaced as a whole.

    Raises InvalidError where matplotlib is missing, UsageError where the folder is, OSError where it cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {path.absolute().parent}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidError("a picture needs matplotlib", hint="pip install 'tfslurm[plot]'") from None

    names = {line.label for chart in charts for line in chart.lines}
    height = 0.8 + 3.4 * len(charts) + 0.25 * math.ceil(len(names) / 3)
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(len(charts), sharex=True, squeeze=False)[:, 0], charts, strict=True):
        _paint(axes, chart)
    figure.axes[-1].set_xlabel("step")
    named: dict[str, object] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, content.getvalue())


def _paint(axes: Axes, chart: Chart) -> None:
    for number, line in enumerate(chart.lines):
        look = {"color": f"C{number % 10}", "linestyle": STYLES[number // 10 % len(STYLES)]}
        if line.raw is not line.points:
            axes.plot(*_columns(line.raw), **look, alpha=0.25, linewidth=0.8)
        axes.plot(*_columns(line.points), **look, linewidth=1.5, label=line.label)
        if line.checks:
            axes.plot(*_columns(line.checks), "o", color=look["color"], markeredgecolor="black")
    if any(line.checks for line in chart.lines):
        label = CHECKED[chart.metric].replace("_", " ")
        axes.plot([], [], "o", color="white", markeredgecolor="black", label=label)
    axes.set_ylabel(METRICS[chart.metric])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))


def _columns(points: list[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
