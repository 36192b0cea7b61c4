"""Sweeps; submissions say what Slurm calls them, where they run, and what they used."""

from peewee import BigIntegerField, CharField, ForeignKeyField, IntegerField, Model, TextField


class Sweep(Model):
    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63, unique=True)
    grid = TextField()
    max_parallel = IntegerField(null=True)
    owner = TextField()
    created_at = BigIntegerField()

    class Meta:
        legacy_table_names = False


def up(migrator, db):
    Sweep.bind(db, False, False)
    Sweep.create_table()
    sweep = ForeignKeyField(Sweep, field=Sweep.id, null=True, on_delete="RESTRICT", on_update="RESTRICT")
    migrator.migrate(
        migrator.add_column("job", "sweep_id", sweep),
        migrator.add_column("submission", "name", CharField(max_length=36, default="")),
        migrator.add_column("submission", "nodes", TextField(null=True)),
        migrator.add_column("submission", "exclude", TextField(default="[]")),
        migrator.add_column("submission", "estimated_start", BigIntegerField(null=True)),
        migrator.add_column("submission", "usage", TextField(null=True)),
        migrator.add_index("submission", ("name",)),
    )
    db.execute_sql("UPDATE submission SET name = uuid WHERE name = ''")
