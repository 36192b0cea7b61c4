"""tfslurm model: the allow-list of base models."""

from __future__ import annotations

from pathlib import Path

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import confirm, reference, yes_option
from tfslurm.cli.output import output_options, print_done, print_one, print_rows


@click.group()
def model() -> None:
    """The base models that may be fine-tuned."""


@model.command()
@click.argument("name")
@click.option("--path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A Hugging Face folder.")
@click.option("--gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A GGUF file.")
@click.option("--hf", metavar="ID[@REV]", help="A model of the Hugging Face Hub, or of its cache on this machine.")
@output_options
@pass_context
def add(context: Context, name: str, path: Path | None, gguf: Path | None, hf: str | None, output: str) -> None:
    """Stage a base model under the root, with its revision and digest.

    \b
    It is read by the training environment. Of a model of the Hub, the commit that the
    revision means now is recorded. Examples:
      tfslurm model add llama-3.1-8b --path /models/Llama-3.1-8B-Instruct
      tfslurm model add smollm2-135m-instruct --gguf SmolLM2-135M-Instruct.Q4_1.gguf
      tfslurm model add smollm2-135m-instruct --hf HuggingFaceTB/SmolLM2-135M-Instruct@main
    """
    if sum(source is not None for source in (path, gguf, hf)) != 1:
        raise click.UsageError("Name one source: --path, --gguf or --hf.")
    from tfslurm.catalog.views import model_view
    from tfslurm.training.base_models import add as stage

    print_one(model_view(stage(context.open(), name, path=path, gguf=gguf, hf=hf)), output)


@model.command("list")
@output_options
@pass_context
def list_(context: Context, output: str) -> None:
    """List the base models."""
    context.open()
    from tfslurm.catalog.models import BaseModel
    from tfslurm.catalog.views import model_view

    rows = (model_view(row) for row in BaseModel.select().order_by(BaseModel.name))
    print_rows(rows, output, ("name", "revision", "owner", "created_at", "source"))


@model.command()
@reference("model")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show a base model, and the hyperparameters that it allows."""
    import msgspec

    settings = context.open()
    from tfslurm.catalog.queries import find_model
    from tfslurm.catalog.views import model_view

    row = find_model(ref)
    print_one({**model_view(row), **msgspec.to_builtins(settings.model(row.name))}, output)


@model.command()
@reference("model")
@yes_option
@output_options
@pass_context
def remove(context: Context, ref: str, yes: bool, output: str) -> None:
    """Take a base model off the list, and its files away; one in the lineage of a job stays."""
    context.open()
    from tfslurm.catalog.queries import find_model
    from tfslurm.catalog.views import model_view
    from tfslurm.training.base_models import remove as take_off

    row = find_model(ref)
    confirm(f"Remove base model '{row.name}' and its files?", yes)
    take_off(row)
    print_done(f"base model '{row.name}' is removed", model_view(row), output)
