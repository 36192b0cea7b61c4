"""tfslurm dataset: the training data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import confirm, listing_options, reference, yes_option
from tfslurm.cli.output import human_size, output_options, print_done, print_one, print_rows, progress_bar
from tfslurm.cli.preview import preview

FORMATS = click.Choice(["conversational", "instruction", "text", "pretokenized"])

format_option = click.option("--format", type=FORMATS, required=True, help="What the rows are.")

map_option = click.option(
    "--map",
    "maps",
    multiple=True,
    metavar="CANONICAL=FIELD",
    help="The rows call this canonical field otherwise; may be repeated. The bytes are not changed.",
)


def parse_map(maps: tuple[str, ...]) -> dict[str, str]:
    """`prompt=question` as {"prompt": "question"}."""
    for pair in maps:
        if not all(pair.partition("=")[::2]):
            raise click.BadParameter(f"'{pair}' is not CANONICAL=FIELD", param_hint="--map")
    return dict(pair.split("=", 1) for pair in maps)


@click.group()
def dataset() -> None:
    """Training data: registered, sealed, and never changed again."""


dataset.add_command(preview)


@dataset.command()
@click.argument("name")
@format_option
@map_option
@output_options
@pass_context
def create(context: Context, name: str, format: str, maps: tuple[str, ...], output: str) -> None:
    """Register a dataset and reserve a place to write its files into.

    \b
    Examples:
      tfslurm dataset create helpdesk --format conversational
      cp *.jsonl "$(tfslurm dataset path helpdesk)" && tfslurm dataset seal helpdesk
      tfslurm dataset create gsm8k --format instruction --map prompt=question --map response=answer
    """
    field_map = parse_map(maps)
    settings = context.open()
    from tfslurm.catalog.views import dataset_view
    from tfslurm.datasets.registry import create as register

    print_one(dataset_view(register(settings, name, format, field_map), settings.root), output)


@dataset.command()
@reference("dataset")
@pass_context
def path(context: Context, ref: str) -> None:
    """Print where the dataset's files lie: writable while it is assembling, read-only once it is ready."""
    context.open()
    from tfslurm.catalog.queries import find_dataset

    click.echo(find_dataset(ref).artifact.location)


@dataset.command()
@reference("dataset")
@output_options
@pass_context
def seal(context: Context, ref: str, output: str) -> None:
    """Validate what was written, publish a read-only copy, and mark it ready.

    Where rows are wrong it stays assembling, with the report: mend them in place and seal again.
    """
    settings = context.open()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view
    from tfslurm.datasets.sealing import seal as publish

    with progress_bar("Sealing") as update:
        sealed = publish(settings, find_dataset(ref), update)
    print_one(dataset_view(sealed, settings.root), output)


@dataset.command("import")
@click.argument("name")
@click.argument("source")
@format_option
@map_option
@click.option("--instance", help="Where to run the copy.")
@click.option("--wait", is_flag=True, help="Come back when it is ready, or has failed.")
@output_options
@pass_context
def import_(
    context: Context,
    name: str,
    source: str,
    format: str,
    maps: tuple[str, ...],
    instance: str | None,
    wait: bool,
    output: str,
) -> None:
    """Copy files in the background, validate them and seal them.

    SOURCE is a file, a folder or a glob ('**' goes into subfolders), s3://BUCKET/KEY, gs://BUCKET/KEY or
    hf://datasets/OWNER/NAME/FILE (files, folders and globs too), a file on a web server, or - for standard input.
    Quote what has *, ? or & in it. A download that is interrupted goes on where it was.

    Credentials are those of the user who imports, where the copy runs: ~/.aws, ~/.config/gcloud,
    ~/.cache/huggingface, ~/.netrc. Variables such as AWS_PROFILE do not travel to a Slurm job: set them in the
    instance's prologue. The query and the password of a URL are not recorded.

    \b
    Examples:
      tfslurm dataset import chats /shared/chats/2026 --format conversational --wait
      tfslurm dataset import chats '/shared/chats/**/*.jsonl.gz' --format conversational
      tfslurm dataset import gsm8k train.jsonl --format instruction --map prompt=question --map response=answer
      tfslurm dataset import tickets s3://acme-data/tickets/2026/ --format conversational
      tfslurm dataset import tickets 'gs://acme-data/tickets/*.jsonl.zst' --format conversational
      tfslurm dataset import books hf://datasets/acme/books@main/data/train.jsonl --format text
      tfslurm dataset import signed 'https://data.example.org/train.jsonl?X-Amz-Signature=...' --format text
      jq -c '.[]' array.json | tfslurm dataset import piped - --format instruction
    """
    field_map = parse_map(maps)
    settings = context.open()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view
    from tfslurm.datasets.importing import start
    from tfslurm.datasets.sources import STDIN, Source

    shown = Source.parse(source).shown
    sys.argv = [shown if word == source else word for word in sys.argv]  # the log of an unexpected error quotes it
    with _spooling(source == STDIN) as (stream, progress):
        row = start(settings, name, format, field_map, source, instance, stream=stream, progress=progress)

    def look() -> dict[str, Any]:
        return dataset_view(find_dataset(row.artifact_id, deleted=True), settings.root)

    if wait:
        from tfslurm.cli.waiting import wait_for

        wait_for(settings, look, good={"ready"}, bad={"error", "deleted"}, line=_import_line)
    print_one(look(), output)


@contextmanager
def _spooling(wanted: bool) -> Iterator[tuple[Any, Any]]:
    """Standard input, and what shows how much of it has come: a bar where its length is known."""
    if not wanted:
        yield None, None
        return
    stream = click.get_binary_stream("stdin")
    if stream.isatty():
        raise click.UsageError("Standard input is a terminal: pipe the data in.")
    with progress_bar("Reading") as bar:

        def update(done: int, total: int) -> None:
            if total:
                bar(done, total)
            elif sys.stderr.isatty():
                click.echo(f"\r\x1b[KReading {human_size(done)}", err=True, nl=False)

        yield stream, update
    if sys.stderr.isatty():
        click.echo(err=True)


def _import_line(view: dict[str, Any]) -> str:
    done = view["progress"]
    share = f" {done['bytes_done'] / max(1, done['bytes_total']):.0%}" if done else ""
    phase = "downloading" if done and done.get("phase") == "download" else "importing"
    return f"{phase} '{view['name']}': {view['status']}{share}"


@dataset.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@format_option
@map_option
@output_options
def validate(files: tuple[Path, ...], format: str, maps: tuple[str, ...], output: str) -> None:
    """Check files, and register nothing.

    \b
    The exit code is 5 where something is wrong. Example:
      tfslurm dataset validate chats.jsonl --format conversational
    """
    from tfslurm.datasets.validation import validate as check

    report = check(list(files), format=format, field_map=parse_map(maps))
    if output == "table":
        click.echo(report.describe())
    else:
        print_one(report.to_dict(), output)
    if not report.ok:
        raise SystemExit(5)


@dataset.command("list")
@click.option("--format", type=FORMATS, help="Only those of this format.")
@listing_options(["assembling", "ready", "error", "deleted"])
@output_options
@pass_context
def list_(context: Context, format: str | None, output: str, **page: Any) -> None:
    """List datasets, the newest first."""
    settings = context.refreshed()
    from tfslurm.catalog.models import Artifact, Dataset
    from tfslurm.catalog.queries import Page, datasets, paged
    from tfslurm.catalog.views import dataset_view

    rows, key = datasets(), Artifact.id
    if format:
        rows, key = rows.where(Dataset.format == format), Dataset.artifact
    rows = paged(rows, Artifact, Page(**page), key=key)
    columns = ("id", "name", "format", "status", "row_count", "size_bytes", "owner", "created_at")
    columns += ("deleted_at", "reclaimed_at") if page["status"] == "deleted" else ()
    if output == "table":
        # Not whole objects: with a thousand datasets they would take as long as all the rest.
        shown = (getattr(Dataset if name in ("format", "row_count") else Artifact, name) for name in columns)
        return print_rows(rows.select(*shown).dicts(), output, columns)
    return print_rows((dataset_view(row, settings.root) for row in rows), output, columns)


@dataset.command()
@reference("dataset")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show a dataset, with what validation found."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view

    print_one(dataset_view(find_dataset(ref, deleted=True), settings.root), output)


@dataset.command()
@reference("dataset")
@click.option("-n", "--rows", type=click.IntRange(1), default=5, show_default=True)
@pass_context
def head(context: Context, ref: str, rows: int) -> None:
    """Print the first rows, as they are."""
    from itertools import islice

    context.open()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.datasets.files import data_files, open_lines

    left = rows
    for file in data_files(Path(find_dataset(ref).artifact.location)):
        with open_lines(file) as lines:
            for line in islice(lines, left):
                click.echo(line.rstrip(b"\r\n").decode(errors="replace"))
                left -= 1
        if not left:
            break


@dataset.command()
@reference("dataset")
@output_options
@pass_context
def events(context: Context, ref: str, output: str) -> None:
    """List what happened to a dataset, and who did it."""
    context.refreshed()
    from tfslurm.catalog.queries import events_of, find_dataset
    from tfslurm.catalog.views import event_view

    rows = (event_view(event) for event in events_of(find_dataset(ref, deleted=True).artifact_id))
    print_rows(rows, output, ("at", "actor", "change", "from", "to", "reason"))


@dataset.command()
@reference("dataset")
@output_options
@pass_context
def verify(context: Context, ref: str, output: str) -> None:
    """Read every byte and compare it with the manifest."""
    settings = context.open()
    from tfslurm.artifacts.manifest import verify_folder
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view
    from tfslurm.errors import StatusError

    row = find_dataset(ref)
    registered = row.artifact
    if registered.status != "ready":
        raise StatusError(f"dataset '{registered.name}' is {registered.status}: there is nothing sealed to verify")
    with progress_bar("Verifying") as update:
        verify_folder(Path(registered.location), registered.digest, progress=update)
    sentence = f"dataset '{registered.name}' is as it was sealed: {registered.digest}"
    print_done(sentence, dataset_view(row, settings.root), output)


@dataset.command()
@reference("dataset")
@yes_option
@output_options
@pass_context
def delete(context: Context, ref: str, yes: bool, output: str) -> None:
    """Hide a dataset; refused while something depends on it. The bytes go later."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view
    from tfslurm.datasets.registry import delete as soft_delete

    row = find_dataset(ref)
    confirm(f"Delete dataset '{row.artifact.name}'?", yes)
    gone = soft_delete(row)
    print_done(f"dataset '{row.artifact.name}' is deleted", dataset_view(gone, settings.root), output)


@dataset.command()
@reference("dataset")
@click.argument("destination", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--how",
    type=click.Choice(["symlink", "bind"]),
    default="symlink",
    show_default=True,
    help="A link, or a mount that only COMMAND (your shell, if none is given) sees and that ends with it.",
)
@click.option("--print", "container", type=click.Choice(["apptainer", "pyxis"]), help="Print the container's option.")
@pass_context
def mount(
    context: Context, ref: str, destination: Path, command: tuple[str, ...], how: str, container: str | None
) -> None:
    """Show a ready dataset, read-only, in a workspace.

    \b
    As long as it lasts, the dataset cannot be deleted. Examples:
      tfslurm dataset mount helpdesk ./data
      tfslurm dataset mount helpdesk ./data --how bind -- python explore.py ./data
      apptainer exec $(tfslurm dataset mount helpdesk /data --print apptainer) image.sif ls /data
    """
    import os

    context.open()
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.datasets import mounts

    row = find_dataset(ref)
    if container:
        return click.echo(mounts.option(row, destination, container))
    if how == "bind":
        raise SystemExit(mounts.run_bound(row, destination, command or (os.environ.get("SHELL", "/bin/sh"),)))
    if command:
        raise click.UsageError("A command goes with --how bind.")
    made = mounts.link(row, destination)
    return click.echo(f"dataset '{row.artifact.name}' is at {made.path}")


@dataset.command()
@click.argument("destination", type=click.Path(path_type=Path))
@pass_context
def unmount(context: Context, destination: Path) -> None:
    """Take a mount away."""
    context.open()
    from tfslurm.datasets.mounts import unmount as take_away

    click.echo(f"{take_away(destination).path} is no longer mounted")


@dataset.command()
@reference("dataset")
@click.option("--as", "name", metavar="NEW", help="Call it so: its old name may be another one's by now.")
@output_options
@pass_context
def restore(context: Context, ref: str, name: str | None, output: str) -> None:
    """Take a deletion back, while the bytes are there."""
    settings = context.open()
    from tfslurm.artifacts.restore import deleted
    from tfslurm.catalog.queries import find_dataset
    from tfslurm.catalog.views import dataset_view
    from tfslurm.datasets.registry import restore as bring_back

    row = find_dataset(deleted("dataset", ref) if name else ref, deleted=True)
    print_one(dataset_view(bring_back(row, name), settings.root), output)
