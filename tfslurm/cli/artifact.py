"""tfslurm artifact: the registry of datasets and checkpoints."""

from __future__ import annotations

from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import listing_options
from tfslurm.cli.output import output_options, print_one, print_rows


@click.group()
def artifact() -> None:
    """The registry of all datasets and checkpoints."""


@artifact.command("list")
@click.option("--kind", type=click.Choice(["dataset", "checkpoint"]), help="Only those of this kind.")
@listing_options(["assembling", "ready", "error", "deleted"])
@output_options
@pass_context
def list_(context: Context, kind: str | None, output: str, **page: Any) -> None:
    """List artifacts: kind, status, size, producer and location."""
    context.refreshed()
    from tfslurm.catalog.models import Artifact
    from tfslurm.catalog.queries import Page, paged
    from tfslurm.catalog.views import artifact_view

    rows = Artifact.select()
    if kind:
        rows = rows.where(Artifact.kind == kind)
    views = (artifact_view(row) for row in paged(rows, Artifact, Page(**page)))
    print_rows(views, output, ("id", "kind", "name", "status", "size_bytes", "producer", "location"))


@artifact.command()
@click.argument("ref", metavar="ID")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show one artifact by its id."""
    context.refreshed()
    from tfslurm.catalog.models import Artifact
    from tfslurm.catalog.views import artifact_view
    from tfslurm.errors import NotFoundError

    row = Artifact.get_or_none(Artifact.id == ref)
    if row is None:
        raise NotFoundError(f"no artifact '{ref}'", hint="See `tfslurm artifact list`.")
    print_one(artifact_view(row), output)
