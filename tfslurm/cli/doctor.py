"""tfslurm doctor."""

from __future__ import annotations

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.output import output_options, print_one, print_rows


@click.command()
@click.option("--settings", "show_settings", is_flag=True, help="Say what is in force, and from where, instead.")
@output_options
@pass_context
def doctor(context: Context, show_settings: bool, output: str) -> None:
    """Check this installation, each finding with its cure.

    \b
    The exit code is 5 where something is wrong. Examples:
      tfslurm doctor
      tfslurm doctor --settings
      tfslurm doctor --json | jq '.findings[] | select(.result != "ok")'
    """
    from tfslurm.settings import in_force

    if show_settings:
        rows = [{"key": key, "value": value, "from": origin} for key, value, origin in in_force(context.settings)]
        return print_rows(rows, output, ("key", "value", "from"))
    from tfslurm.installation import examine

    rows = [{"check": f.check, "result": f.result, "said": f.said, "cure": f.cure} for f in examine(context.settings)]
    sources = [str(file) for file in context.settings.site_layers.files]
    if output == "table":
        click.echo(f"Configuration: {', over '.join(reversed(sources))}")
        for row in rows:
            _line(row)
    else:
        print_one({"configuration": sources, "findings": rows}, output)
    if any(row["result"] == "wrong" for row in rows):
        raise SystemExit(5)
    return None


def _line(row: dict[str, str | None]) -> None:
    colour = {"ok": "green", "warning": "yellow", "wrong": "red"}[row["result"]]
    click.echo(f"{click.style(row['result'].ljust(8), fg=colour)} {row['check'].ljust(18)} {row['said']}")
    if row["cure"]:
        click.echo(f"{' ' * 28}→ {row['cure']}")
