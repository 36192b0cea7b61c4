"""Deleted artifacts say when their bytes were given up."""

from peewee import BigIntegerField


def up(migrator, db):
    migrator.migrate(migrator.add_column("artifact", "reclaimed_at", BigIntegerField(null=True)))
