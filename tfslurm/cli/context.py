"""What every command starts from: the settings, and the open catalog."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import click

from tfslurm import settings as configuration
from tfslurm.settings import Settings


class Context:
    """Settings are read, and the catalog opened, when a command first needs them."""

    def __init__(self, config: Path | None, root: Path | None) -> None:
        self._config, self._root = config, root

    @property
    def loaded(self) -> bool:
        """Whether the settings have been read."""
        return "settings" in self.__dict__

    @cached_property
    def settings(self) -> Settings:
        return configuration.load(self._config, self._root)

    def open(self) -> Settings:
        """Open the catalog; the settings."""
        from tfslurm.catalog.db import connect

        connect(self.settings)
        return self.settings

    def refreshed(self) -> Settings:
        """Open the catalog and bring it up to date; says so on stderr where that was not possible."""
        settings = self.open()
        from tfslurm.catalog.queries import launchers_alive, unaccounted

        if launchers_alive() or unaccounted(limit=1):
            from tfslurm.sync import refresh

            summary = refresh(settings)
            if summary.stale:
                click.echo(f"Slurm does not answer ({summary.stale}): this is the state of the last sync.", err=True)
            for failure in summary.failed:
                click.echo(f"sync: {failure}", err=True)
        return settings


pass_context = click.make_pass_decorator(Context)
