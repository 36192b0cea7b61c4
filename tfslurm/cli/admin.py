"""tfslurm admin: for whoever looks after the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_rows

if TYPE_CHECKING:
    from tfslurm.artifacts.fsck import Mended


@click.group()
def admin() -> None:
    """For whoever looks after the installation."""


@admin.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended safely; nothing is deleted by it.")
@click.option("--full", is_flag=True, help="Read every byte of every dataset, checkpoint and base model.")
@output_options
@pass_context
def fsck(context: Context, repair: bool, full: bool, output: str) -> None:
    """Compare the catalog with the bytes; of everything that is wrong, say the cure.

    The exit code is 5 where something is left wrong.
    """
    settings = context.open()
    from tfslurm.artifacts.fsck import Mended, examine
    from tfslurm.artifacts.fsck import repair as mend
    from tfslurm.errors import InvalidError
    from tfslurm.sync import sync

    sync(settings)
    found = [mend(finding) if repair else Mended(finding, None) for finding in examine(settings, full=full)]
    rows = [_view(mended) for mended in found]
    if output != "table" or rows:
        print_rows(rows, output, ("check", "ref", "said", "repaired", "cure"))
    left = sum(row["repaired"] is None for row in rows)
    if left:
        raise InvalidError(f"{left} of {len(rows)} findings are left" if repair else f"{left} findings")
    if output == "table":
        click.echo(f"{len(rows)} findings, all mended" if rows else "nothing is wrong")


def _view(mended: Mended) -> dict[str, Any]:
    finding = mended.finding
    cure = f"{mended.why} {finding.cure}" if mended.why else finding.cure
    return {
        "check": finding.check,
        "ref": finding.ref,
        "said": finding.said,
        "repaired": mended.done,
        "cure": None if mended.done else cure,
        "repairable": finding.mend is not None,
    }
