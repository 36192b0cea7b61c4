"""Jobs name the dataset that their loss is validated on."""

from peewee import CharField, ForeignKeyField, Model


class Dataset(Model):
    artifact_id = CharField(primary_key=True, max_length=32)

    class Meta:
        legacy_table_names = False


def up(migrator, db):
    Dataset.bind(db, False, False)
    dataset = ForeignKeyField(Dataset, field=Dataset.artifact_id, null=True, on_delete="RESTRICT", on_update="RESTRICT")
    migrator.migrate(migrator.add_column("job", "validation_dataset_id", dataset))
