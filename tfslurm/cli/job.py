"""tfslurm job: fine-tuning jobs."""

from __future__ import annotations

import json
from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import listing_options, names_of, reference
from tfslurm.cli.output import output_options, print_one, print_rows
from tfslurm.cli.waiting import timeout_option

STATUSES = ["pending", "running", "stopping", "stopped", "completed", "error"]


@click.group()
def job() -> None:
    """Fine-tuning: a base model, a ready dataset and six numbers."""


def _view(settings: Any, ref: str) -> dict[str, Any]:
    from tfslurm.catalog.queries import find_job, submissions_of
    from tfslurm.catalog.views import job_view

    row = find_job(ref)
    return job_view(row, settings.root, submissions_of([row.id]).get(row.id))


@job.command()
@click.option("--model", required=True, shell_complete=names_of("model"), help="The base model.")
@click.option("--dataset", required=True, shell_complete=names_of("dataset"), help="A ready dataset.")
@click.option("--learning-rate", type=float, help="Of AdamW, at its peak.")
@click.option("--epochs", type=int, help="How often every row is seen.")
@click.option("--effective-batch-size", type=int, help="Rows a step, over all processes.")
@click.option("--max-seq-length", type=int, help="The longest row, in tokens.")
@click.option("--lora-rank", type=int)
@click.option("--lora-alpha", type=int)
@click.option("--instance", help="The size of machine; auto picks one.")
@click.option("--name", help="Default: the dataset's name and a few letters.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print everything that would be run, and run nothing.")
@click.option("--wait", is_flag=True, help="Come back when it has ended.")
@timeout_option
@output_options
@pass_context
def create(
    context: Context,
    model: str,
    dataset: str,
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

    made = plan(settings, Request(model, dataset, hyperparameters, instance, name, seed))
    if dry_run:
        return _print_plan(settings, made)
    row = submit(settings, made)
    if wait:
        _wait(settings, row.id, timeout)
    return print_one(_view(settings, row.id), output)


def _print_plan(settings: Any, made: Any) -> None:
    from tfslurm.training.jobs import estimate

    for title, text in (
        ("training.json", made.config.encode().decode()),
        ("deepspeed.json", json.dumps(made.deepspeed, indent=2) + "\n"),
        ("script.sh", made.script),
    ):
        click.echo(f"# --- {title}\n{text}")
    if made.instance.launcher == "slurm":
        click.echo(f"# --- sbatch --test-only\n{estimate(settings, made)}")


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
    done = view["progress"]
    if view["status"] != "running" or not done:
        waiting = f" ({view['slurm_reason']})" if view["slurm_reason"] else ""
        return f"job '{view['name']}': {view['status']}{waiting}"
    return (
        f"job '{view['name']}': step {done['step']}/{done['steps']}  loss {done['loss']:.3f}  "
        f"{done['tokens_per_second']:.0f} tokens/s  {done['eta_seconds']:.0f} s left"
    )


@job.command("list")
@listing_options(STATUSES)
@output_options
@pass_context
def list_(context: Context, output: str, **page: Any) -> None:
    """List jobs, the newest first."""
    settings = context.refreshed()
    from tfslurm.catalog.models import Job
    from tfslurm.catalog.queries import Page, jobs, paged, submissions_of
    from tfslurm.catalog.views import job_view

    rows = list(paged(jobs(), Job, Page(**page)))
    submissions = submissions_of(row.id for row in rows)
    views = (job_view(row, settings.root, submissions.get(row.id)) for row in rows)
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
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@pass_context
def logs(context: Context, ref: str, follow: bool) -> None:
    """Print what the job printed, of all its attempts."""
    settings = context.refreshed()
    from tfslurm.catalog.models import JobStatus
    from tfslurm.catalog.queries import find_job
    from tfslurm.cli.following import print_logs
    from tfslurm.sync import refresh

    row = find_job(ref)

    def ended() -> bool:
        refresh(settings)
        return JobStatus(find_job(row.id).status).ended

    print_logs(settings.root.job(row.id).logs, "attempt-*.log", ended if follow else None)


@job.command()
@reference("job")
@output_options
@pass_context
def metrics(context: Context, ref: str, output: str) -> None:
    """List the metrics of every step."""
    settings = context.open()
    from tfslurm.catalog.queries import find_job

    file = settings.root.job(find_job(ref).id).metrics
    lines = file.read_text().splitlines() if file.exists() else []
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    print_rows((json.loads(line) for line in lines), output, columns)


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
@reference("job")
@timeout_option
@output_options
@pass_context
def wait(context: Context, ref: str, timeout: float | None, output: str) -> None:
    """Come back when the job has ended: 0 completed, 8 timed out, 9 anything else."""
    print_one(_wait(context.refreshed(), ref, timeout), output)


@job.command()
@reference("job")
@output_options
@pass_context
def stop(context: Context, ref: str, output: str) -> None:
    """Stop a job at its next step boundary; a second time, at once. No checkpoint comes of it."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_job
    from tfslurm.training.jobs import stop as end

    row = end(settings, find_job(ref))
    print_one(_view(context.refreshed(), row.id), output)
