"""tfslurm job sweep and job cells: jobs over a grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import names_of, reference, training_options
from tfslurm.cli.output import output_options, print_one, print_rows
from tfslurm.cli.waiting import timeout_option


def sweep_option(text: str) -> Callable[[Callable], Callable]:
    """`--sweep`, completed by the shell."""
    return click.option("--sweep", shell_complete=names_of("sweep"), help=text)


def job_or_sweep(command: Callable) -> Callable:
    """The argument that names a job, or --sweep in its place."""

    def one_of_both(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if bool(value) == bool(ctx.params.get("sweep")):
            raise click.UsageError("name a job, or a sweep with --sweep")
        return value

    command = click.argument(
        "ref", metavar="[JOB]", required=False, shell_complete=names_of("job"), callback=one_of_both
    )(command)
    return click.option("--sweep", is_eager=True, shell_complete=names_of("sweep"), help="All jobs of this sweep.")(
        command
    )


@click.command()
@training_options
@click.option("--grid", multiple=True, metavar="FIELD=V,V…", help="Values of one field to try; once for each field.")
@click.option("--name", help="Default: the dataset's name and a few letters. A job's is this and its number.")
@click.option("--seed", type=click.IntRange(0), help="Default: 0; or vary it with --grid.")
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="At most so many jobs at the same time.")
@click.option("--dry-run", is_flag=True, help="Print everything that would be run, and run nothing.")
@click.option("--wait", is_flag=True, help="Come back when all have ended.")
@timeout_option
@output_options
@pass_context
def sweep(
    context: Context,
    model: str,
    dataset: str,
    validation_dataset: str | None,
    instance: str | None,
    grid: tuple[str, ...],
    name: str | None,
    seed: int | None,
    max_parallel: int | None,
    dry_run: bool,
    wait: bool,
    timeout: float | None,
    output: str,
    **hyperparameters: float | None,
) -> None:
    """Start a job for every cell of a grid, as one array of Slurm's.

    Every --grid names a hyperparameter or `seed`, and the values to try; what is not in the grid is as in `job
    create`. More cells than Slurm's MaxArraySize become several arrays, which share --max-parallel between them.
    Without Slurm the cells run one after the other, or --max-parallel at a time.

    \b
    Examples:
      tfslurm job sweep --model llama-3.1-8b --dataset chats --grid learning-rate=1e-4,2e-4 --grid lora-rank=8,16
      tfslurm job sweep --model llama-3.1-8b --dataset chats --grid seed=1,2,3 --name again --max-parallel 2 --wait
      tfslurm job cells again
    """
    settings = context.open()
    from tfslurm.training import jobs, sweeps
    from tfslurm.training.grid import parse_grid

    values = parse_grid(grid)
    if seed is not None and "seed" in dict(values):
        raise click.UsageError("seed is both fixed and in the grid")
    fixed = jobs.Request(model, dataset, hyperparameters, instance, name, seed or 0, validation_dataset)
    made = sweeps.plan(settings, sweeps.Request(fixed, values, max_parallel))
    if dry_run:
        return _print_plan(settings, made, output)
    row = sweeps.create(settings, made)
    return print_one(wait_for_sweep(settings, row.id, timeout) if wait else _view(row.id), output)


def _view(ref: str) -> dict[str, Any]:
    from tfslurm.catalog.queries import find_sweep
    from tfslurm.training.ranking import sweep_view

    return sweep_view(find_sweep(ref))


def wait_for_sweep(settings: Any, ref: str, timeout: float | None) -> dict[str, Any]:
    """Come back when all jobs of the sweep have ended; its view."""
    from tfslurm.cli.waiting import wait_for

    return wait_for(
        settings,
        lambda: _view(ref),
        good={"completed"},
        bad={"error", "stopped"},
        timeout=timeout,
        line=lambda view: f"sweep '{view['name']}': {_counts(view)}",
    )


def stop_sweep(settings: Any, ref: str) -> dict[str, Any]:
    """Stop all its jobs; its view."""
    from tfslurm.catalog.queries import find_sweep
    from tfslurm.sync import sync
    from tfslurm.training import sweeps

    row = find_sweep(ref)
    sweeps.stop(settings, row)
    sync(settings, patience=settings.site.slurm.listing_timeout)
    return _view(row.id)


def _counts(view: dict[str, Any]) -> str:
    return ", ".join(f"{count} {status}" for status, count in view["statuses"].items())


def _print_plan(settings: Any, made: Any, output: str) -> None:
    """The cells, and what the first of them would run; the others differ in what the list says."""
    from tfslurm.slurm.client import SlurmRefused
    from tfslurm.training.jobs import deepspeed_text, estimate

    first = made.batches[0]
    said = refused = None
    try:
        said = estimate(settings, made.instance, first.script)
    except SlurmRefused as error:
        refused = error
    training, deepspeed = first.cells[0].encoded.decode(), deepspeed_text(first.cells[0].config).decode()
    cells = [_planned(cell) for cell in made.cells]
    if output != "table":
        parsed = {"training": json.loads(training), "deepspeed": json.loads(deepspeed), "script": first.script}
        print_one({"name": made.name, "cells": cells, **parsed, "test_only": said}, output)
    else:
        fields = [name for name, _ in made.request.grid]
        print_rows([{**cell, **cell["hyperparameters"]} for cell in cells], output, ("name", *fields))
        for title, text in (("training.json", training), ("deepspeed.json", deepspeed), ("script.sh", first.script)):
            click.echo(f"\n# --- {title}\n{text}")
        if said:
            click.echo(f"# --- sbatch --test-only\n{said}")
    if refused:
        raise refused


def _planned(cell: Any) -> dict[str, Any]:
    import msgspec

    config = cell.config
    return {
        "name": config.name,
        "hyperparameters": msgspec.to_builtins(config.hyperparameters),
        "seed": config.seed,
    }


@click.command()
@reference("sweep")
@output_options
@pass_context
def cells(context: Context, ref: str, output: str) -> None:
    """Rank the jobs of a sweep: the lowest validation loss first, else the lowest loss of the last training step."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_sweep
    from tfslurm.training.ranking import ranked

    row = find_sweep(ref)
    rows = ranked(settings.root, row)
    fields = [name for name, _ in row.grid]
    if output == "table":
        rows = [{**cell, **cell["hyperparameters"]} for cell in rows]
    print_rows(rows, output, ("rank", "name", *fields, "status", "loss", "loss_of", "checkpoint"))
