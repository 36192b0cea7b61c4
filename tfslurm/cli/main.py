"""The commands by name, and what an error comes to."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import click

from tfslurm import __version__
from tfslurm.cli.context import Context
from tfslurm.errors import NotPermittedError, TfslurmError

COMMANDS = {
    "admin": "admin:admin",
    "artifact": "artifact:artifact",
    "checkpoint": "checkpoint:checkpoint",
    "completion": "completion:completion",
    "dataset": "dataset:dataset",
    "doctor": "doctor:doctor",
    "endpoint": "endpoint:endpoint",
    "init": "init:init",
    "job": "job:job",
    "lineage": "lineage:lineage",
    "model": "model:model",
    "reclaim": "reclaim:reclaim",
    "sync": "sync:sync",
}
"""Each command's module and name below tfslurm.cli; a module is imported when its command is asked for."""

EXIT_CODES = """\b
Exit codes:
  0  done                          5  bad data or configuration
  1  our fault                     6  not permitted
  2  usage                         7  Slurm, database or storage unreachable
  3  no such object                8  a wait timed out
  4  the status doesn't allow it   9  what was waited for ended badly"""


class LazyGroup(click.Group):
    """A group whose commands are imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        return getattr(import_module(f"tfslurm.cli.{module}"), attribute)


@click.group(cls=LazyGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="The site's configuration file.")
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), help="The storage root.")
@click.version_option(__version__, prog_name="tfslurm")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, root: Path | None) -> None:
    """A Token Factory on your own Slurm cluster: from a dataset to a served, fine-tuned model.

    \b
    Examples:
      tfslurm dataset create helpdesk --format conversational
      tfslurm job create --model smollm2-135m-instruct --dataset helpdesk --epochs 3 --wait
      tfslurm endpoint create helper --checkpoint helpdesk-v1
      tfslurm lineage helper
    """
    ctx.obj = Context(config, root)


def main() -> None:
    """Run the command line; the process's exit code is one of errors.py's."""
    if "_TFSLURM_COMPLETE" in os.environ:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, "tfslurm", "_TFSLURM_COMPLETE", os.environ["_TFSLURM_COMPLETE"]))
    ctx: click.Context | None = None
    try:
        with cli.make_context("tfslurm", sys.argv[1:]) as ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Aborted!", err=True)
        sys.exit(130)
    except TfslurmError as error:
        _say(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader has gone (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except PermissionError as error:
        _say(f"{error.filename}: {error.strerror}", None)
        sys.exit(NotPermittedError.exit_code)
    except Exception as error:
        _say(f"unexpected {type(error).__name__}: {error}", _keep_traceback(ctx and ctx.obj))
        sys.exit(1)


def _say(message: str, hint: str | None) -> None:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(hint, err=True)


def _keep_traceback(context: Context | None) -> str:
    """Append the traceback to the log under the root, or to one in the home folder where that is not to be had."""
    text = f"{datetime.now(UTC).isoformat()} {' '.join(sys.argv)}\n{traceback.format_exc()}\n"
    places = [Path.home() / ".tfslurm.log"]
    if context is not None and context.loaded:
        places.insert(0, context.settings.root.log)
    for place in places:
        try:
            with open(place, "a") as file:
                file.write(text)
        except OSError:
            continue
        return f"The traceback is in {place}: please report it."
    return text
