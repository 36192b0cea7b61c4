"""tfslurm reclaim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import human_size, output_options, print_one, print_rows

if TYPE_CHECKING:
    from tfslurm.artifacts.reclaim import Step, Summary


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and of all that stays why; change nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@output_options
@pass_context
def reclaim(context: Context, dry_run: bool, quiet: bool, output: str) -> None:
    """Give the bytes free that nobody needs any more.

    For cron, once a day; safe to run at any time, anywhere, twice. What was deleted long enough ago, and what
    killed commands left over, goes into the trash; so does what jobs that ended long ago left besides their
    configuration, their metrics and the ends of their logs. The trash is emptied of what has been there long enough.
    site.yaml says how long, under reclaim.
    """
    settings = context.open()
    from tfslurm.artifacts.reclaim import Summary, plan
    from tfslurm.artifacts.reclaim import reclaim as run
    from tfslurm.errors import TfslurmError, UnreachableError
    from tfslurm.sync import sync

    stale = sync(settings).stale
    summary = Summary(steps=plan(settings, stale=stale)) if dry_run else run(settings, stale=stale)
    if not quiet:
        _print(summary, dry_run, output)
    if summary.failed:
        raise TfslurmError("not everything could be reclaimed", hint="\n".join(summary.failed))
    if stale:
        raise UnreachableError(f"Slurm does not answer: {stale}", hint="What depends on it stays.")


def _print(summary: Summary, dry_run: bool, output: str) -> None:
    rows = [_view(step) for step in summary.steps]
    if output != "table":
        counts = {"ran": summary.ran, "dry_run": dry_run, "freed_bytes": summary.freed_bytes}
        return print_one({**counts, "steps": rows}, output)
    if rows:
        print_rows(rows, output, ("action", "ref", "name", "size_bytes", "reason"))
    click.echo(_said(summary, dry_run))
    return None


def _view(step: Step) -> dict[str, Any]:
    name = getattr(step.subject, "name", None) if step.action in ("reclaim", "prune", "keep") else None
    keys = {"action": step.action, "ref": step.ref, "name": name}
    return {**keys, "size_bytes": step.size_bytes, "reason": step.reason}


def _said(summary: Summary, dry_run: bool) -> str:
    if not summary.ran:
        return "another process is at it"
    actions = ("reclaim", "trash", "prune", "remove")
    counts = {action: sum(step.action == action for step in summary.steps) for action in actions}
    would = "would be " if dry_run else ""
    freed = "" if dry_run else f" ({human_size(summary.freed_bytes)})"
    return (
        f"{would}reclaimed: {counts['reclaim']}, {would}moved to the trash: {counts['trash']}, "
        f"{would}pruned: {counts['prune']}, {would}removed from it: {counts['remove']}{freed}"
    )
