"""Printing: tables for people, JSON and its kin for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

Row = dict[str, Any]

FORMATS = ("table", "json", "jsonl", "csv", "yaml")


def output_options(command: Callable) -> Callable:
    """`-o/--output` and `--json`: the command gets the chosen format as `output`."""

    def as_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.params["output"] = "json"

    command = click.option(
        "--json", is_flag=True, expose_value=False, callback=as_json, help="The same as --output json."
    )(command)
    return click.option(
        "-o", "--output", type=click.Choice(FORMATS), default="table", callback=_kept, help="How to print it."
    )(command)


def _kept(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """--json wins, wherever it stands."""
    return ctx.params.get("output", value)


def print_rows(rows: Iterable[Row], output: str, columns: Sequence[str]) -> None:
    """A listing; a table shows `columns`, everything else all keys."""
    if output == "table":
        return _table(list(rows), columns)
    if output == "json":
        return click.echo(json.dumps(list(rows), indent=2, ensure_ascii=False))
    if output == "jsonl":
        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
        return None
    return _csv(list(rows)) if output == "csv" else _yaml(list(rows))


def print_one(row: Row, output: str) -> None:
    """One object; for people a line a key, nested ones indented."""
    if output == "table":
        return _details(row)
    if output in ("json", "jsonl"):
        return click.echo(json.dumps(row, indent=2 if output == "json" else None, ensure_ascii=False))
    return _csv([row]) if output == "csv" else _yaml(row)


def print_done(sentence: str, row: Row, output: str) -> None:
    """What was done: a sentence for people, the object as it is now for scripts."""
    if output == "table":
        click.echo(sentence)
    else:
        print_one(row, output)


def _table(rows: list[Row], columns: Sequence[str]) -> None:
    cells = [[column.upper().replace("_", " ") for column in columns]]
    cells += [[_cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    click.echo("\n".join(lines))


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.endswith("_bytes"):
        return human_size(value)
    if column.endswith("_at"):
        return str(value)[:19].replace("T", " ")
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _details(row: Row, indent: str = "") -> None:
    width = max((len(key) for key in row), default=0)
    for key, value in row.items():
        if isinstance(value, dict) and value:
            click.echo(f"{indent}{key}:")
            _details(value, indent + "  ")
        elif isinstance(value, list) and value:
            click.echo(f"{indent}{key}:")
            for item in value:
                click.echo(f"{indent}  {item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)}")
        else:
            click.echo(f"{indent}{key.ljust(width)}  {_cell(key, value or None if value == {} else value)}")


def _csv(rows: list[Row]) -> None:
    import csv

    if not rows:
        return
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        plain = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v for k, v in row.items()}
        writer.writerow(plain)


def _yaml(value: Any) -> None:
    import yaml

    click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)


def human_size(size: float) -> str:
    """Bytes as people read them: 1.5 KiB, 20 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for (done, total), shown as a bar on a terminal's stderr and nowhere else."""
    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = click.progressbar(length=total, label=label, file=sys.stderr)
            bar.__enter__()
        bar.update(done - bar.pos)

    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    try:
        yield update
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
