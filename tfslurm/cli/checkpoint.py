"""tfslurm checkpoint: what fine-tuning jobs produced."""

from __future__ import annotations

from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import confirm, listing_options, reference, yes_option
from tfslurm.cli.output import output_options, print_done, print_one, print_rows, progress_bar


@click.group()
def checkpoint() -> None:
    """Trained weights, registered when a job succeeds."""


@checkpoint.command("list")
@listing_options(["ready", "deleted"])
@output_options
@pass_context
def list_(context: Context, output: str, **page: Any) -> None:
    """List checkpoints."""
    context.refreshed()
    from tfslurm.catalog.models import Artifact
    from tfslurm.catalog.queries import Page, checkpoints, paged
    from tfslurm.catalog.views import checkpoint_view

    views = (checkpoint_view(row) for row in paged(checkpoints(), Artifact, Page(**page)))
    columns = ("id", "name", "status", "base_model", "job", "size_bytes", "created_at")
    columns += ("deleted_at", "reclaimed_at") if page["status"] == "deleted" else ()
    print_rows(views, output, columns)


@checkpoint.command()
@reference("checkpoint")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show a checkpoint."""
    context.refreshed()
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.catalog.views import checkpoint_view

    print_one(checkpoint_view(find_checkpoint(ref, deleted=True)), output)


@checkpoint.command()
@reference("checkpoint")
@output_options
@pass_context
def verify(context: Context, ref: str, output: str) -> None:
    """Read every byte and compare it with the manifest."""
    from pathlib import Path

    context.open()
    from tfslurm.artifacts.manifest import verify_folder
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.catalog.views import checkpoint_view

    row = find_checkpoint(ref)
    registered = row.artifact
    with progress_bar("Verifying") as update:
        verify_folder(Path(registered.location), registered.digest, progress=update)
    sentence = f"checkpoint '{registered.name}' is as it was registered: {registered.digest}"
    print_done(sentence, checkpoint_view(row), output)


@checkpoint.command()
@reference("checkpoint")
@yes_option
@output_options
@pass_context
def delete(context: Context, ref: str, yes: bool, output: str) -> None:
    """Hide a checkpoint; refused while an endpoint serves it."""
    context.refreshed()
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.catalog.views import checkpoint_view
    from tfslurm.training.checkpoints import delete as soft_delete

    row = find_checkpoint(ref)
    confirm(f"Delete checkpoint '{row.artifact.name}'?", yes)
    print_done(f"checkpoint '{row.artifact.name}' is deleted", checkpoint_view(soft_delete(row)), output)


@checkpoint.command()
@reference("checkpoint")
@output_options
@pass_context
def restore(context: Context, ref: str, output: str) -> None:
    """Take a deletion back, while the bytes are there."""
    context.open()
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.catalog.views import checkpoint_view
    from tfslurm.training.checkpoints import restore as bring_back

    print_one(checkpoint_view(bring_back(find_checkpoint(ref, deleted=True))), output)
