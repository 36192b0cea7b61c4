"""tfslurm sync."""

from __future__ import annotations

from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_done, print_one


@click.command()
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--every",
    type=click.IntRange(min=0),
    metavar="MINUTES",
    help="Instead, let a small Slurm job do it so often, for sites without cron; 0 ends that.",
)
@click.option("--instance", help="Where that job runs; default: the site's instance for imports.")
@output_options
@pass_context
def sync(context: Context, quiet: bool, every: int | None, instance: str | None, output: str) -> None:
    """Fold into the catalog what happened to everything that runs.

    \b
    For cron, and for the end of every batch script; safe to run at any time, anywhere, twice. Examples:
      */5 * * * * tfslurm sync --quiet
      tfslurm sync --every 5 --instance cpu
      tfslurm sync --every 0
    """
    settings = context.open()
    if every is not None:
        return _periodic(settings, every, instance, output)
    from tfslurm.errors import TfslurmError, UnreachableError
    from tfslurm.sync import sync as run

    summary = run(settings)
    if not quiet:
        print_one({"alive": summary.alive, "ran": summary.ran, "stale": summary.stale}, output)
    if summary.failed:
        raise TfslurmError("some of it could not be folded in", hint="\n".join(summary.failed))
    if summary.stale:
        raise UnreachableError(f"Slurm does not answer: {summary.stale}")
    return None


def _periodic(settings: Any, minutes: int, instance: str | None, output: str) -> None:
    from tfslurm.slurm import periodic

    if minutes == 0:
        ended = periodic.stop(settings)
        return print_done(f"cancelled: {', '.join(ended) or 'none was queued'}", {"cancelled": ended}, output)
    job_id = periodic.start(settings, periodic.plan(settings, minutes=minutes, instance=instance))
    return print_done(f"job {job_id} syncs every {minutes} minutes", {"slurm_job_id": job_id, "every": minutes}, output)
