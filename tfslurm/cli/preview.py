"""tfslurm dataset preview: rows as the model will see them."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import names_of, reference
from tfslurm.cli.output import output_options, print_one

if TYPE_CHECKING:
    from tfslurm.training.preview import Place, Preview, PreviewedRow, Token

SHADES = {True: ("green", "bright_green"), False: ("bright_black", None)}
"""By whether a token carries loss; neighbours take turns, so that each token can be seen."""


@click.command()
@reference("dataset")
@click.option("--model", required=True, shell_complete=names_of("model"), help="The base model that is to see them.")
@click.option("-n", "--rows", type=click.IntRange(1), default=5, show_default=True, help="How many, from the first on.")
@click.option("--row", "chosen", multiple=True, metavar="FILE:LINE", help="This one; may be repeated.")
@click.option("--max-seq-length", type=int, help="Where rows are cut; default: the model's own.")
@output_options
@pass_context
def preview(
    context: Context,
    ref: str,
    model: str,
    rows: int,
    chosen: tuple[str, ...],
    max_seq_length: int | None,
    output: str,
) -> None:
    """Show rows as the model will see them: tokens, what carries loss, what is cut or left out.

    On a terminal, what carries loss is green and the shade changes from token to token; elsewhere it stands in
    [brackets]. The training environment tokenizes them. A dataset that is still assembling is read as it is.

    \b
    Examples:
      tfslurm dataset preview helpdesk --model smollm2-135m-instruct
      tfslurm dataset preview helpdesk --model llama-3.1-8b --row chats/may.jsonl:17 --max-seq-length 512
      tfslurm dataset preview helpdesk --model llama-3.1-8b --rows 100 --json | jq '.rows[].token_count'
    """
    places = [_place(text) for text in chosen]
    settings = context.open()
    from tfslurm.catalog.queries import find_dataset, find_model
    from tfslurm.training.preview import preview as look

    dataset, base = find_dataset(ref), find_model(model)
    made = look(settings, dataset, base, count=rows, places=places, max_seq_length=max_seq_length)
    if output == "table":
        return _print(made)
    return print_one(_view(made, dataset.artifact.name, base.name), output)


def _place(text: str) -> Place:
    from tfslurm.training.preview import Place

    file, _, line = text.rpartition(":")
    if not file or not line.isdecimal() or int(line) < 1:
        raise click.BadParameter(f"'{text}' is not FILE:LINE, such as train.jsonl:3", param_hint="--row")
    return Place(file, int(line))


def _view(made: Preview, dataset: str, model: str) -> dict[str, Any]:
    import msgspec

    totals = {"token_count": made.token_count, "supervised_count": made.supervised_count, **made.statuses}
    counted = dict.fromkeys(("kept", "truncated", "dropped", "rejected"), 0) | totals
    return {
        "dataset": dataset,
        "model": model,
        "max_seq_length": made.max_seq_length,
        "totals": counted,
        "rows": msgspec.to_builtins(made.rows),
    }


def _print(made: Preview) -> None:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for row in made.rows:
        click.secho(_headline(row), bold=True)
        if row.tokens:
            click.echo(_painted(row.tokens) if coloured else _bracketed(row.tokens))
        click.echo()
    statuses = ", ".join(f"{count} {status}" for status, count in made.statuses.items()) or "none"
    share = f" ({made.supervised_count / made.token_count:.0%})" if made.token_count else ""
    click.echo(
        f"{len(made.rows)} row{'s' * (len(made.rows) != 1)} at max_seq_length {made.max_seq_length}: {statuses}; "
        f"{made.token_count:,} tokens are trained on, {made.supervised_count:,} of them carry loss{share}"
    )


def _headline(row: PreviewedRow) -> str:
    counts = f"{row.token_count:,} tokens, {row.supervised_count:,} carry loss"
    if row.status == "truncated":
        counts = f"{row.length - row.token_count:,} of {row.length:,} tokens are cut; {counts}"
    elif row.reason:
        counts = row.reason
    return f"{row.file}:{row.line}  {row.status}: {counts}"


def _painted(tokens: list[Token]) -> str:
    shades = (SHADES[token.learned][number % 2] for number, token in enumerate(tokens))
    return "".join(click.style(_plain(token.text), fg=shade) for token, shade in zip(tokens, shades, strict=True))


def _bracketed(tokens: list[Token]) -> str:
    text, inside = "", False
    for token in tokens:
        if token.learned != inside:
            text += "[" if token.learned else "]"
            inside = token.learned
        text += _plain(token.text)
    return text + ("]" if inside else "")


def _plain(text: str) -> str:
    """Control characters as escapes: a row must not speak to the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
