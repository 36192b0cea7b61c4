"""`job plot` and `job metrics`: the curves of jobs, in the terminal and as a picture."""

import json
import math
import os
import pty
import subprocess
import sys

import pytest

from tfslurm.catalog.models import Job, Sweep, now
from tfslurm.cli.plot import MARGIN, MOST, charts_of, draw, round_values
from tfslurm.errors import InvalidError
from tfslurm.training.curves import chart_of, read_metrics, smoothed


def metrics(steps=100, rate=30.0, **more):
    return [
        {
            "step": step,
            "epoch": 1,
            "loss": 1 + 3 * math.exp(-step / rate),
            "learning_rate": 2e-4 * (1 - step / steps),
            "grad_norm": None if step == 1 else 0.5,
            "tokens_per_second": 12_000.0 + step,
            "peak_memory_bytes": 3 * 2**30,
            **more,
        }
        for step in range(1, steps + 1)
    ]


def write(installation, job, lines):
    path = installation.root.job(job.id).metrics
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(text):
    """The drawn part: what stands right of the axis."""
    return [line[MARGIN + 1 :] for line in text.splitlines() if line[MARGIN : MARGIN + 1] == "│"]


def test_a_falling_loss_falls_on_the_screen(installation, cli):
    write(installation, installation.job(), metrics())
    done = cli("job", "plot", "first")
    assert done.code == 0
    title, *lines = done.stdout.splitlines()
    assert title == "loss"
    rows = rows_of(done.stdout)
    ends = [max((at for at, char in enumerate(row) if char not in " \u2800"), default=0) for row in rows]
    assert ends == sorted(ends) and ends[-1] == 66, "the curve goes right as it goes down, to the last column"
    labels = [line[:MARGIN].strip() for line in lines]
    assert [label for label in labels if label] == ["4", "3", "2", "1", "step"]
    assert lines[-1].split() == ["step", "50", "100"]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [60, 100, 180])
def test_it_is_as_wide_as_the_terminal(installation, columns):
    write(installation, installation.job(), metrics())
    done = installation.run("job", "plot", "first", check=0, COLUMNS=str(columns), PYTHONIOENCODING="utf-8")
    axis = next(line for line in done.stdout.splitlines() if "└" in line)
    assert len(axis) == columns - 1
    assert max(map(len, done.stdout.splitlines())) <= columns


def test_a_terminal_has_colours(installation):
    write(installation, installation.job(), metrics())
    write(installation, installation.job("second"), metrics(rate=60.0))
    ours, theirs = pty.openpty()
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environ |= {"TFSLURM_CONFIG": str(installation.config), "TERM": "xterm"}
    command = [sys.executable, "-m", "tfslurm", "job", "plot", "first", "second"]
    process = subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    try:
        while data := os.read(ours, 4096):
            screen += data
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert process.wait(20) == 0
    assert b"\x1b[36m" in screen and b"\x1b[33m" in screen


def test_several_jobs_have_a_letter_each_and_points_where_they_were_validated(installation, cli):
    lines = metrics()
    for line in lines[19::20]:
        line["validation_loss"] = line["loss"] + 0.1
    write(installation, installation.job(), lines)
    write(installation, installation.job("second"), metrics(rate=60.0))
    done = cli("job", "plot", "first", "second")
    drawn = "".join(rows_of(done.stdout))
    assert {char for char in drawn if char.isalpha()} == {"a", "b", "A"}
    assert drawn.count("A") == 5
    assert [line.strip() for line in done.stdout.splitlines()[-2:]] == ["a first  (A: validation loss)", "b second"]
    alone = cli("job", "plot", "first").stdout
    assert "".join(rows_of(alone)).count("o") == 5
    assert alone.splitlines()[-1].strip() == "o validation loss"


def test_several_metrics_stand_below_each_other(installation, cli):
    write(installation, installation.job(), metrics())
    done = cli("job", "plot", "first", "--metric", "loss, learning-rate,grad_norm,peak_memory_bytes")
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == ["loss", "learning rate", "gradient norm", "peak memory (GiB)"]
    assert "0.0002" in done.stdout and "1e+" not in done.stdout


def test_what_cannot_be_drawn_is_said(installation, cli):
    job = installation.job()
    assert cli("job", "plot", "first").stderr == "Error: first: no loss is known yet\nIt comes with the first step.\n"
    write(installation, job, metrics(1))
    assert cli("job", "plot", "first").code == 0
    for words, code, said in (
        (("first", "--metric", "grad_norm"), 4, "no gradient norm is known yet"),
        (("nothing",), 3, "no job 'nothing'"),
        (("--sweep", "nothing"), 3, "no sweep 'nothing'"),
        (("first", "--metric", "colour"), 2, "'colour' is none of loss, learning_rate"),
        ((), 2, "name jobs, or a sweep"),
    ):
        done = cli("job", "plot", *words)
        assert (done.code, done.stdout) == (code, "")
        assert said in done.stderr


def test_all_jobs_of_a_sweep_come_in_one_picture(installation, cli):
    sweep = Sweep.create(id="sw-0000000000000001", name="rates", grid=[], owner="somebody", created_at=now())
    for number in range(3):
        job = installation.job(f"rates-{number}")
        write(installation, job, metrics(rate=20.0 * (number + 1)))
        Job.update(sweep=sweep).where(Job.id == job.id).execute()
    write(installation, installation.job(), metrics())
    done = cli("job", "plot", "--sweep", "rates")
    assert [line.split()[1] for line in done.stdout.splitlines()[-3:]] == ["rates-0", "rates-1", "rates-2"]
    done = cli("job", "plot", "first", "rates-1", "--sweep", "rates")
    names = [line.split()[1] for line in done.stdout.splitlines()[-4:]]
    assert names == ["first", "rates-1", "rates-0", "rates-2"], "each once, in the order in which they were named"


def test_a_picture_holds_no_more_jobs_than_can_be_told_apart(installation):
    jobs = [installation.job()] * (MOST + 1)
    with pytest.raises(InvalidError, match=f"these are {MOST + 1} jobs, and one picture holds {MOST}"):
        charts_of(installation.root, jobs, ["loss"], 1)


def test_a_job_without_metrics_leaves_the_others_alone(installation, cli):
    write(installation, installation.job(), metrics())
    installation.job("waiting")
    done = cli("job", "plot", "first", "waiting")
    assert done.code == 0 and "waiting" not in done.stdout


def test_a_curve_that_does_not_move_can_be_drawn():
    for lines in ([{"step": 1, "loss": 0.0}], [{"step": step, "loss": 2.5} for step in (5, 6)]):
        text = draw(chart_of("loss", [("x", lines)]), 60, 8, False)
        assert "⠀" in text or "⣀" in text or any("\u2801" <= char <= "\u28ff" for char in text)


@pytest.mark.parametrize(
    ("low", "high", "count", "values"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0.9, 4.1, 4, [1, 2, 3, 4]),
        (0, 3e-4, 3, [0, 1e-4, 2e-4, 3e-4]),
        (11_800, 12_400, 3, [11_800, 12_000, 12_200, 12_400]),
        (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_the_values_at_the_axis_are_round(low, high, count, values):
    assert round_values(low, high, count) == pytest.approx(values)


def test_what_a_later_attempt_trained_again_counts_and_a_torn_line_does_not(installation, cli):
    lines = [*metrics(5, attempt=0), *metrics(5, rate=10.0, attempt=1)[2:4]]
    path = write(installation, installation.job(), lines)
    with open(path, "a") as file:
        file.write('{"step": 4, "validation_loss": 9.5}\n{"step": 5, "lo')
    told = read_metrics(path)
    assert [(line["step"], line["attempt"]) for line in told] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert (told[3]["validation_loss"], told[3]["loss"]) == (9.5, lines[-1]["loss"])
    assert [row["step"] for row in cli("job", "metrics", "first", "--json").json()] == [1, 2, 3, 4]
    assert read_metrics(path.with_name("nothing")) == []


def test_smoothing_is_the_mean_of_the_last_steps():
    points = [(1, 4.0), (2, 2.0), (4, 6.0), (5, 1.0)]
    assert smoothed(points, 1) == points
    assert smoothed(points, 2) == [(1, 4.0), (2, 3.0), (4, 4.0), (5, 3.5)]
    assert smoothed(points, 99) == [(1, 4.0), (2, 3.0), (4, 4.0), (5, 3.25)]
    assert smoothed([], 3) == []
    # The learning rate is no measurement.
    (line,) = chart_of("learning_rate", [("x", metrics())], 10).lines
    assert line.points == line.raw


def pixels(path):
    pytest.importorskip("matplotlib", reason="SKIPPED: no matplotlib here, so no picture is drawn or looked at")
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize("smooth", ["1", "10"])
def test_a_picture_holds_every_job_in_a_colour_of_its_own(installation, cli, smooth):
    pytest.importorskip("matplotlib", reason="SKIPPED: no matplotlib here, so no picture is drawn or looked at")
    write(installation, installation.job(), metrics())
    write(installation, installation.job("second"), metrics(rate=60.0))
    path = installation.folder / "curves.png"
    path.write_bytes(b"an older picture")
    words = ("first", "second", "--metric", "loss,grad_norm", "--smooth", smooth)
    done = cli("job", "plot", *words, "--png", str(path))
    assert (done.code, done.stdout) == (0, f"{path}\n"), done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    image = pixels(path)
    assert image.shape[1] == 1080 and image.shape[0] > 900
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
    for color in (blue, orange):
        near = abs(image[:, :, :3] * 255 - color).max(axis=2) < 3
        assert near.sum() > 300
    assert not [name for name in os.listdir(installation.folder) if name.startswith(".curves")]


def test_without_matplotlib_a_picture_names_the_cure(installation, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    write(installation, installation.job(), metrics())
    path = installation.folder / "curves.png"
    done = cli("job", "plot", "first", "--png", str(path))
    assert (done.code, done.stderr) == (5, "Error: a picture needs matplotlib\npip install 'tfslurm[plot]'\n")
    assert not path.exists()


def test_a_picture_that_cannot_be_written_is_said(installation, cli):
    pytest.importorskip("matplotlib", reason="SKIPPED: no matplotlib here, so no picture is drawn or looked at")
    write(installation, installation.job(), metrics())
    missing = installation.folder / "nowhere" / "curves.png"
    done = cli("job", "plot", "first", "--png", str(missing))
    assert done.code == 2
    assert str(missing.parent) in done.stderr
