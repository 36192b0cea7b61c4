"""tfslurm completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and names in your shell.

    \b
    Examples:
      tfslurm completion bash >> ~/.bashrc
      tfslurm completion zsh >> ~/.zshrc
      tfslurm completion fish > ~/.config/fish/completions/tfslurm.fish
    """
    from tfslurm.cli.main import cli

    click.echo(get_completion_class(shell)(cli, {}, "tfslurm", "_TFSLURM_COMPLETE").source())
