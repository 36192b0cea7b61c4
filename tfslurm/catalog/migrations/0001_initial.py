"""The first schema. A frozen copy: it makes the same tables whatever models.py says later."""

from peewee import SQL, AutoField, BigIntegerField, CharField, ForeignKeyField, IntegerField, Model, TextField


def reference(model, **options):
    return ForeignKeyField(model, on_delete="RESTRICT", on_update="RESTRICT", **options)


class Table(Model):
    class Meta:
        legacy_table_names = False


class Artifact(Table):
    id = CharField(primary_key=True, max_length=32)
    kind = CharField(max_length=16)
    name = CharField(max_length=63)
    status = CharField(max_length=16)
    size_bytes = BigIntegerField(null=True)
    file_count = IntegerField(null=True)
    digest = CharField(max_length=80, null=True)
    location = TextField()
    producer = TextField(null=True)
    owner = TextField()
    error = TextField(null=True)
    created_at = BigIntegerField()
    sealed_at = BigIntegerField(null=True)
    deleted_at = BigIntegerField(null=True)


Artifact.add_index(
    Artifact.index(Artifact.kind, Artifact.name, unique=True, name="artifact_name").where(SQL("status <> 'deleted'"))
)
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.status, Artifact.id, name="artifact_status"))
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.id, name="artifact_kind"))
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.owner, Artifact.id, name="artifact_owner"))


class Dataset(Table):
    artifact = reference(Artifact, primary_key=True)
    format = CharField(max_length=16)
    field_map = TextField()
    source = TextField(null=True)
    row_count = BigIntegerField(null=True)
    metadata = TextField()


Dataset.add_index(Dataset.index(Dataset.format, Dataset.artifact, name="dataset_format"))


class BaseModel(Table):
    name = CharField(primary_key=True, max_length=63)
    revision = CharField(max_length=80)
    digest = CharField(max_length=80)
    location = TextField()
    source = TextField()
    metadata = TextField()
    owner = TextField()
    created_at = BigIntegerField()


class Job(Table):
    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63, unique=True)
    status = CharField(max_length=16, index=True)
    base_model = reference(BaseModel, column_name="base_model")
    base_model_revision = CharField(max_length=80)
    dataset = reference(Dataset)
    instance = CharField(max_length=63)
    config_digest = CharField(max_length=80)
    attempt = IntegerField()
    error = TextField(null=True)
    owner = TextField()
    created_at = BigIntegerField()
    started_at = BigIntegerField(null=True)
    ended_at = BigIntegerField(null=True)


class Checkpoint(Table):
    artifact = reference(Artifact, primary_key=True)
    job = reference(Job, unique=True)
    base_model = reference(BaseModel, column_name="base_model")
    base_model_revision = CharField(max_length=80)
    metadata = TextField()


class Endpoint(Table):
    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63)
    status = CharField(max_length=16, index=True)
    url = TextField(null=True)
    checkpoint = reference(Checkpoint)
    instance = CharField(max_length=63)
    config_digest = CharField(max_length=80)
    attempt = IntegerField()
    error = TextField(null=True)
    owner = TextField()
    created_at = BigIntegerField()
    started_at = BigIntegerField(null=True)
    ended_at = BigIntegerField(null=True)


Endpoint.add_index(Endpoint.index(Endpoint.name, unique=True, name="endpoint_name").where(SQL("status <> 'deleted'")))


class Submission(Table):
    uuid = CharField(primary_key=True, max_length=36)
    kind = CharField(max_length=16)
    object_id = CharField(max_length=32)
    state = CharField(max_length=16)
    launcher = CharField(max_length=16)
    cluster = TextField(null=True)
    job_id = CharField(max_length=64, null=True)
    array_index = IntegerField(null=True)
    attempt = IntegerField()
    slurm_state = CharField(max_length=32, null=True)
    reason = TextField(null=True)
    created_at = BigIntegerField()
    submitted_at = BigIntegerField(null=True)
    ended_at = BigIntegerField(null=True)


Submission.add_index(Submission.index(Submission.state, Submission.kind, name="submission_state"))
Submission.add_index(Submission.index(Submission.object_id, Submission.created_at, name="submission_object"))


class Mount(Table):
    id = AutoField()
    artifact = reference(Artifact)
    path = TextField()
    how = CharField(max_length=16)
    host = TextField()
    process = CharField(max_length=32, null=True)
    owner = TextField()
    created_at = BigIntegerField()
    ended_at = BigIntegerField(null=True)


class Event(Table):
    id = AutoField()
    at = BigIntegerField()
    actor = TextField()
    kind = CharField(max_length=16)
    object_id = CharField(max_length=63, index=True)
    change = CharField(max_length=32)
    from_status = CharField(max_length=16, null=True)
    to_status = CharField(max_length=16, null=True)
    reason = TextField(null=True)


class Lease(Table):
    name = CharField(primary_key=True, max_length=63)
    holder = TextField()
    renewed_at = BigIntegerField()
    expires_at = BigIntegerField()


TABLES = (Artifact, Dataset, BaseModel, Job, Checkpoint, Endpoint, Submission, Mount, Event, Lease)


def up(migrator, db):
    with db.bind_ctx(TABLES):
        db.create_tables(TABLES, safe=False)
