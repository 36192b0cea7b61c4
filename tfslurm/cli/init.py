"""tfslurm init."""

from __future__ import annotations

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_one


@click.command()
@output_options
@pass_context
def init(context: Context, output: str) -> None:
    """Make the storage root and the catalog, or bring them up to date.

    \b
    Running it again does no harm. Examples:
      tfslurm init
      tfslurm --root /shared/tokenfactory init
    """
    from tfslurm.installation import install

    root = context.settings.root
    print_one({"root": str(root.path), "catalog": str(root.catalog), "migrations": install(context.settings)}, output)
