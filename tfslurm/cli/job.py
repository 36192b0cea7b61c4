"""tfslurm job: fine-tuning jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.following import names_of_job_logs, print_logs, rank_option
from tfslurm.cli.options import listing_options, names_of, reference, training_options
from tfslurm.cli.output import output_options, print_one, print_rows
from tfslurm.cli.sweep import cells, job_or_sweep, stop_sweep, sweep, sweep_option, wait_for_sweep
from tfslurm.cli.waiting import duration, progress_line, timeout_option

STATUSES = ["pending", "running", "stopping", "stopped", "completed", "error"]


@click.group()
def job() -> None:
    """Fine-tuning: a base model, a ready dataset and six numbers."""


job.add_command(sweep)
job.add_command(cells)


def _view(settings: Any, ref: str) -> dict[str, Any]:
    from tfslurm.catalog.queries import find_job, submissions_of, usage_of
    from tfslurm.catalog.views import job_view

    row = find_job(ref)
    return job_view(row, settings.root, submissions_of([row.id]).get(row.id), usage_of([row.id]).get(row.id))


@job.command()
@training_options
@click.option("--name", help="Default: the dataset's name and a few letters.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print everything that would be run, and run nothing.")
@click.option("--wait", is_flag=True, help="Come back when it has ended.")
@timeout_option
@output_options
@pass_context
def create(
    context: Context,
    model: str,
    dataset: str,
    validation_dataset: str | None,
    instance: str | None,
    name: str | None,
    seed: int,
    dry_run: bool,
    wait: bool,
    timeout: float | None,
    output: str,
    **hyperparameters: float | None,
) -> None:
    """Start a fine-tuning job.

    \b
    What is left out takes the base model's default, and `job show` shows it. Examples:
      tfslurm job create --model smollm2-135m-instruct --dataset helpdesk
      tfslurm job create --model llama-3.1-8b --dataset chats --learning-rate 1e-4 --instance gpu-8 --wait
      tfslurm job create --model llama-3.1-8b --dataset chats --dry-run
    """
    settings = context.open()
    from tfslurm.training.jobs import Request, plan
    from tfslurm.training.jobs import create as submit

    made = plan(settings, Request(model, dataset, hyperparameters, instance, name, seed, validation_dataset))
    if dry_run:
        return _print_plan(settings, made, output)
    row = submit(settings, made)
    if wait:
        _wait(settings, row.id, timeout)
    return print_one(_view(settings, row.id), output)


def _print_plan(settings: Any, made: Any, output: str) -> None:
    from tfslurm.slurm.client import SlurmRefused
    from tfslurm.training.jobs import deepspeed_text, estimate

    said = refused = None
    try:
        said = estimate(settings, made.instance, made.script)
    except SlurmRefused as error:
        refused = error
    training, deepspeed = made.config.encode().decode(), deepspeed_text(made.config).decode()
    if output != "table":
        parsed = {"training": json.loads(training), "deepspeed": json.loads(deepspeed)}
        print_one({**parsed, "script": made.script, "memory": _memory_view(made.memory), "test_only": said}, output)
    else:
        for title, text in (("training.json", training), ("deepspeed.json", deepspeed), ("script.sh", made.script)):
            click.echo(f"# --- {title}\n{text}")
        _print_memory(made.memory)
        if said:
            click.echo(f"# --- sbatch --test-only\n{said}")
    if refused:
        raise refused


def _memory_view(choice: Any) -> dict[str, Any]:
    """Bytes of each GPU, null where they are not known."""
    from dataclasses import asdict

    from tfslurm.training.memory import gpu_memory

    needed = choice.estimate
    return {
        "total_bytes": needed and needed.total,
        "parts": needed and {f"{part}_bytes": size for part, size in asdict(needed).items()},
        "available_bytes": gpu_memory(choice.instance),
        "remark": choice.remark,
    }


def _print_memory(choice: Any) -> None:
    if choice.estimate:
        total = choice.estimate.total / 2**30
        click.echo(f"# --- memory of each GPU, estimated\n{total:.1f} GiB: {choice.estimate.describe()}")
    if choice.remark:
        click.secho(f"# {choice.remark}", fg="yellow")


def _wait(settings: Any, ref: str, timeout: float | None) -> dict[str, Any]:
    from tfslurm.cli.waiting import wait_for

    return wait_for(
        settings,
        lambda: _view(settings, ref),
        good={"completed"},
        bad={"error", "stopped"},
        timeout=timeout,
        line=_progress_line,
    )


def _progress_line(view: dict[str, Any]) -> str:
    done, name = view["progress"], f"job '{view['name']}'"
    if view["status"] != "running" or not done:
        waiting = f" ({view['slurm_reason']})" if view["slurm_reason"] else ""
        again = f", step {done['step']} of {done['steps']} done" if done else ""
        return f"{name}: {view['status']}{again}{waiting}"
    said = (
        f"{done['step']}/{done['steps']}  loss {done['loss']:.3f}  {done['tokens_per_second']:,.0f} tokens/s  "
        f"{duration(done['eta_seconds'])} left"
    )
    return progress_line(name, done["step"], done["steps"], said)


@job.command("list")
@listing_options(STATUSES)
@sweep_option("Only those of this sweep.")
@output_options
@pass_context
def list_(context: Context, sweep: str | None, output: str, **page: Any) -> None:
    """List jobs, the newest first."""
    settings = context.refreshed()
    from tfslurm.catalog.models import Job
    from tfslurm.catalog.queries import Page, find_sweep, jobs, paged, submissions_of, usage_of
    from tfslurm.catalog.views import job_view

    wanted = jobs().where(Job.sweep == find_sweep(sweep)) if sweep else jobs()
    rows = list(paged(wanted, Job, Page(**page)))
    ids = [row.id for row in rows]
    submissions, usage = submissions_of(ids), usage_of(ids)
    views = (job_view(row, settings.root, submissions.get(row.id), usage.get(row.id)) for row in rows)
    print_rows(views, output, ("id", "name", "status", "base_model", "dataset", "instance", "owner", "created_at"))


@job.command()
@reference("job")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show a job: its hyperparameters, its progress and, if it failed, why."""
    print_one(_view(context.refreshed(), ref), output)


@job.command()
@reference("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended, through all its attempts.")
@rank_option
@click.option("--attempt", type=click.IntRange(0), help="One attempt, 0 being the first; default: all.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines of each log.")
@pass_context
def logs(context: Context, ref: str, follow: bool, rank: int | None, attempt: int | None, tail: int | None) -> None:
    """Print what the job printed, of all its attempts and processes.

    \b
    A header on stderr names the log where there are several. Examples:
      tfslurm job logs helpdesk-v1 -f
      tfslurm job logs helpdesk-v1 --attempt 2 --rank 3 --tail 50
    """
    settings = context.refreshed()
    from tfslurm.catalog.models import JobStatus
    from tfslurm.catalog.queries import find_job
    from tfslurm.errors import NotFoundError
    from tfslurm.files import read_json
    from tfslurm.sync import refresh

    row = find_job(ref)
    paths = settings.root.job(row.id)

    def ended() -> bool:
        refresh(settings)
        newest = (read_json(paths.started) or {}).get("attempt", 0)
        return JobStatus(find_job(row.id).status).ended or (attempt is not None and newest > attempt)

    wanted = names_of_job_logs(attempt, rank)
    if not print_logs(paths.logs, wanted, ended if follow else None, tail) and (rank or attempt is not None):
        raise NotFoundError(f"job '{row.name}' has no such log", hint=f"Its logs are in {paths.logs}.")


@job.command()
@reference("job")
@output_options
@pass_context
def metrics(context: Context, ref: str, output: str) -> None:
    """List the metrics of every step."""
    settings = context.open()
    from tfslurm.catalog.queries import find_job
    from tfslurm.training.curves import read_metrics

    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    print_rows(read_metrics(settings.root.job(find_job(ref).id).metrics), output, columns)


def _metrics(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    from tfslurm.training.curves import METRICS

    names = [name.strip().replace("-", "_") for name in value.split(",")]
    for unknown in (name for name in names if name not in METRICS):
        raise click.BadParameter(f"'{unknown}' is none of {', '.join(METRICS)}.")
    return names


@job.command()
@click.argument("refs", nargs=-1, metavar="[JOB]...", shell_complete=names_of("job"))
@sweep_option("All jobs of this sweep.")
@click.option("--metric", "metrics", default="loss", show_default=True, callback=_metrics, help="Several with commas.")
@click.option("--smooth", type=click.IntRange(1), default=1, metavar="N", help="Draw the mean of the last N steps.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture instead.")
@pass_context
def plot(
    context: Context, refs: tuple[str, ...], sweep: str | None, metrics: list[str], smooth: int, png: Path | None
) -> None:
    """Draw the curves of jobs, or of all jobs of a sweep, over their steps.

    \b
    A picture needs tfslurm[plot]. Examples:
      tfslurm job plot helpdesk-v1
      tfslurm job plot helpdesk-v1 helpdesk-v2 --metric loss,grad_norm --smooth 10
      tfslurm job plot --sweep helpdesk-rates --png curves.png
    """
    settings = context.open()
    from tfslurm.catalog.queries import find_job, find_sweep, jobs_of
    from tfslurm.cli.plot import charts_of, picture, show

    jobs = {job.id: job for job in [*map(find_job, refs), *(jobs_of(find_sweep(sweep)) if sweep else ())]}
    if not jobs:
        raise click.UsageError("name jobs, or a sweep with --sweep")
    charts = charts_of(settings.root, list(jobs.values()), metrics, smooth)
    if png is None:
        return click.echo(show(charts))
    picture(charts, png)
    return click.echo(png)


@job.command()
@reference("job")
@output_options
@pass_context
def events(context: Context, ref: str, output: str) -> None:
    """List what happened to a job, and who did it."""
    context.refreshed()
    from tfslurm.catalog.queries import events_of, find_job
    from tfslurm.catalog.views import event_view

    rows = (event_view(event) for event in events_of(find_job(ref).id))
    print_rows(rows, output, ("at", "actor", "change", "from", "to", "reason"))


@job.command()
@job_or_sweep
@timeout_option
@output_options
@pass_context
def wait(context: Context, ref: str | None, sweep: str | None, timeout: float | None, output: str) -> None:
    """Come back when the job has ended: 0 completed, 8 timed out, 9 anything else."""
    if sweep:
        return print_one(wait_for_sweep(context.refreshed(), sweep, timeout), output)
    return print_one(_wait(context.refreshed(), ref, timeout), output)


@job.command()
@job_or_sweep
@output_options
@pass_context
def stop(context: Context, ref: str | None, sweep: str | None, output: str) -> None:
    """Stop a job at its next step boundary; a second time, at once. No checkpoint comes of it."""
    settings = context.refreshed()
    if sweep:
        return print_one(stop_sweep(settings, sweep), output)
    from tfslurm.catalog.queries import find_job
    from tfslurm.sync import sync
    from tfslurm.training.stopping import stop as end

    row = end(settings, find_job(ref))
    sync(settings, patience=settings.site.slurm.listing_timeout)
    return print_one(_view(settings, row.id), output)
