"""tfslurm checkpoint: what fine-tuning jobs produced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import confirm, listing_options, reference, yes_option
from tfslurm.cli.output import human_size, output_options, print_done, print_one, print_rows, progress_bar


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
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option("--merged", is_flag=True, help="Merge it into its base model: a whole model, which needs no PEFT.")
@output_options
@pass_context
def export(context: Context, ref: str, destination: Path, merged: bool, output: str) -> None:
    """Write a checkpoint's verified bytes to DEST, with a model card that states the lineage.

    DEST must not exist, or be an empty folder. It appears whole or not at all. Merging happens on this machine, in
    the training environment, and takes 4 bytes of memory a parameter: run it where that is to be had.

    \b
    Examples:
      tfslurm checkpoint export helpdesk-v1 ./helpdesk-adapter
      tfslurm checkpoint export helpdesk-v1 ./helpdesk-model --merged
      srun --mem=64G tfslurm checkpoint export helpdesk-v1 /shared/models/helpdesk --merged
    """
    settings = context.open()
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.training.export import export as write

    row = find_checkpoint(ref)
    with ExitStack() as bars:

        def bar(label: str) -> Callable[[int, int], None]:
            update = bars.enter_context(progress_bar(label))

            def show(done: int, total: int) -> None:
                update(done, total)
                if done >= total:
                    bars.close()  # what is printed next needs a line of its own

            return show

        made = write(settings, row, destination, merged=merged, progress=bar)
    kind = "model" if merged else "adapter"
    sentence = f"checkpoint '{row.artifact.name}' is at {made.destination}: {kind}, {human_size(made.size)}"
    print_done(sentence, _exported_view(row, made), output)


def _exported_view(row: Any, made: Any) -> dict[str, Any]:
    import msgspec

    return {
        "checkpoint": row.artifact_id,
        "name": row.artifact.name,
        "location": str(made.destination),
        "merged": made.agreement is not None,
        "size_bytes": made.size,
        "file_count": made.files,
        "digest": made.digest,
        "checkpoint_digest": row.artifact.digest,
        "base_model": row.base_model_id,
        "base_model_revision": row.base_model_revision,
        "agreement": msgspec.to_builtins(made.agreement),
    }


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
@click.option("--as", "name", metavar="NEW", help="Call it so: its old name may be another one's by now.")
@output_options
@pass_context
def restore(context: Context, ref: str, name: str | None, output: str) -> None:
    """Take a deletion back, while the bytes are there."""
    context.open()
    from tfslurm.artifacts.restore import deleted
    from tfslurm.catalog.queries import find_checkpoint
    from tfslurm.catalog.views import checkpoint_view
    from tfslurm.training.checkpoints import restore as bring_back

    row = find_checkpoint(deleted("checkpoint", ref) if name else ref, deleted=True)
    print_one(checkpoint_view(bring_back(row, name)), output)
