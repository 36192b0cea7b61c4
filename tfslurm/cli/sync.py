"""tfslurm sync."""

from __future__ import annotations

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_one


@click.command()
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@output_options
@pass_context
def sync(context: Context, quiet: bool, output: str) -> None:
    """Fold into the catalog what happened to everything that runs.

    For cron, and for the end of every batch script; safe to run at any time, anywhere, twice.
    """
    from tfslurm.errors import TfslurmError, UnreachableError
    from tfslurm.sync import sync as run

    summary = run(context.open())
    if not quiet:
        print_one({"alive": summary.alive, "ran": summary.ran, "stale": summary.stale}, output)
    if summary.failed:
        raise TfslurmError("some of it could not be folded in", hint="\n".join(summary.failed))
    if summary.stale:
        raise UnreachableError(f"Slurm does not answer: {summary.stale}")
