"""tfslurm lineage."""

from __future__ import annotations

from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_one


@click.command()
@click.argument("ref", metavar="REF")
@output_options
@pass_context
def lineage(context: Context, ref: str, output: str) -> None:
    """Which weights, from which run, on which bytes, with which hyperparameters.

    \b
    REF is the id or name of an endpoint, a checkpoint, a job or a dataset. Examples:
      tfslurm lineage helper
      tfslurm lineage helper --json | jq .job.hyperparameters
    """
    settings = context.refreshed()
    from tfslurm.catalog.lineage import trace

    views = _views(trace(ref), settings.root)
    if output == "table":
        return _tree(views)
    return print_one(views, output)


def _views(chain: Any, root: Any) -> dict[str, Any]:
    from tfslurm.catalog import views
    from tfslurm.catalog.models import Checkpoint, Endpoint, Job
    from tfslurm.catalog.queries import submissions_of

    runs = [row for row in (chain.job, chain.endpoint, *chain.consumers) if isinstance(row, (Job, Endpoint))]
    submissions = submissions_of(row.id for row in runs)

    def view(row: Any) -> dict[str, Any] | None:
        if row is None:
            return None
        if isinstance(row, Job):
            return views.job_view(row, root, submissions.get(row.id))
        if isinstance(row, Endpoint):
            return views.endpoint_view(row, root, submissions.get(row.id))
        if isinstance(row, Checkpoint):
            return views.checkpoint_view(row)
        return None

    return {
        "endpoint": view(chain.endpoint),
        "checkpoint": view(chain.checkpoint),
        "job": view(chain.job),
        "dataset": views.dataset_view(chain.dataset, root),
        "validation_dataset": views.dataset_view(chain.validation_dataset, root) if chain.validation_dataset else None,
        "base_model": views.model_view(chain.base_model) if chain.base_model else None,
        "consumers": [view(row) for row in chain.consumers],
    }


def _tree(views: dict[str, Any]) -> None:
    depth = 0
    for kind in ("endpoint", "checkpoint", "job"):
        if views[kind]:
            _line(depth, views[kind])
            depth += 1
    if views["job"]:
        for name, value in views["job"]["hyperparameters"].items():
            click.echo(f"{'   ' * depth}   {name} {value:g}")
    _line(depth, views["dataset"])
    if views["validation_dataset"]:
        _line(depth, {**views["validation_dataset"], "kind": "validation dataset"})
    if views["base_model"]:
        model = views["base_model"]
        click.echo(f"{'   ' * depth}└─ base model {model['name']} @ {model['revision']}")
    if views["consumers"]:
        click.echo("consumers:")
        for consumer in views["consumers"]:
            _line(1, consumer)


def _line(depth: int, view: dict[str, Any]) -> None:
    branch = "   " * (depth - 1) + "└─ " if depth else ""
    digest = f"  {view['digest'][:19]}" if view.get("digest") else ""
    click.echo(f"{branch}{view['kind']} {view['name']}  {view['id']}  {view['status']}{digest}")
