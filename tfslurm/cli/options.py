"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from tfslurm.cli.context import Context

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def listing_options(statuses: list[str]) -> Callable[[Callable], Callable]:
    """The filters and the paging of every listing."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(
            [
                click.option("--status", type=click.Choice(statuses), help="Only those with this status."),
                click.option("--owner", help="Only those of this user."),
                click.option("--name", metavar="GLOB", help="Only those whose name matches."),
                click.option("--limit", type=click.IntRange(1), help="At most so many, the newest first."),
                click.option("--after", metavar="ID", help="Go on behind the last one of the page before."),
            ]
        ):
            command = option(command)
        return command

    return decorate


def training_options(command: Callable) -> Callable:
    """What is trained on what, with which six numbers, on which instance: of a job, and of a sweep's jobs."""
    for option in reversed(
        [
            click.option("--model", required=True, shell_complete=names_of("model"), help="The base model."),
            click.option("--dataset", required=True, shell_complete=names_of("dataset"), help="A ready dataset."),
            click.option(
                "--validation-dataset",
                shell_complete=names_of("dataset"),
                help="A ready dataset to measure the loss on; the checkpoint is then that of the best step.",
            ),
            click.option("--learning-rate", type=float, help="Of AdamW, at its peak."),
            click.option("--epochs", type=int, help="How often every row is seen."),
            click.option("--effective-batch-size", type=int, help="Rows a step, over all processes."),
            click.option("--max-seq-length", type=int, help="The longest row, in tokens."),
            click.option("--lora-rank", type=int),
            click.option("--lora-alpha", type=int),
            click.option("--instance", help="The size of machine; auto picks one."),
        ]
    ):
        command = option(command)
    return command


def reference(kind: str, name: str = "ref") -> Callable:
    """The argument that names an object by id or name, completed by the shell from the catalog."""
    return click.argument(name, metavar=kind.upper(), shell_complete=names_of(kind))


def names_of(kind: str) -> Callable:
    """A completer for the names of the objects of a kind."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from tfslurm.catalog.models import Artifact, BaseModel, Endpoint, Job, Sweep
        from tfslurm.errors import TfslurmError

        table = {"model": BaseModel, "job": Job, "endpoint": Endpoint, "sweep": Sweep}.get(kind, Artifact)
        root = ctx.find_root()
        try:
            Context(root.params.get("config"), root.params.get("root")).open()
        except TfslurmError:
            return []
        rows = table.select(table.name).where(table.name.startswith(incomplete))
        if table is Artifact:
            rows = rows.where(Artifact.kind == kind, Artifact.status != "deleted")
        return [CompletionItem(row.name) for row in rows.order_by(table.name).limit(100)]

    return complete


def confirm(question: str, yes: bool) -> None:
    """Ask, unless --yes was given."""
    if not yes:
        click.confirm(question, abort=True, err=True)


yes_option = click.option("-y", "--yes", is_flag=True, help="Don't ask.")
