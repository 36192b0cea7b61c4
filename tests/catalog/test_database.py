import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from peewee import IntegrityError, SqliteDatabase

from tfslurm.catalog import db
from tfslurm.catalog.db import check_schema, connect, insert_all, migrate, write_transaction
from tfslurm.catalog.models import TABLES, Artifact, Event, Lease, Submission, database, now
from tfslurm.errors import NotPermittedError, StatusError, UnreachableError


def schema(connection):
    """Every table's columns, foreign keys and indexes, with the partial ones' conditions."""
    found = {}
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? ORDER BY name", (table,)
        )
        found[table] = (
            sorted(row[1:] for row in connection.execute(f"PRAGMA table_info({table})")),
            sorted(row[2:] for row in connection.execute(f"PRAGMA foreign_key_list({table})")),
            indexes.fetchall(),
        )
    return found


def test_the_migrations_make_the_schema_of_the_models(installation):
    migrated = schema(sqlite3.connect(installation.root.catalog))
    del migrated["schema_migration"]
    fresh = SqliteDatabase(":memory:")
    with fresh.bind_ctx(TABLES):
        fresh.create_tables(TABLES)
        assert schema(fresh.connection()) == migrated


def test_migrating_again_does_nothing(installation):
    before = schema(sqlite3.connect(installation.root.catalog))
    assert migrate(installation.settings) == []
    assert schema(sqlite3.connect(installation.root.catalog)) == before


def test_several_inits_at_once_make_one_catalog(tmp_path):
    command = [sys.executable, "-m", "tfslurm", "--root", tmp_path / "root", "init"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "1234"]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0, 0], said
    assert sum("0001_initial" in text for text in said) == 1


def test_a_missing_catalog_says_how_to_make_one(installation, tmp_path):
    installation.configure(root=str(tmp_path / "elsewhere"))
    with pytest.raises(UnreachableError, match="no catalog at") as caught:
        connect(installation.settings)
    assert "tfslurm init" in caught.value.hint
    assert not (tmp_path / "elsewhere").exists()


def test_an_older_catalog_asks_for_init_and_a_newer_one_for_an_upgrade(installation):
    database.execute_sql("INSERT INTO schema_migration (name, applied) VALUES ('9999_later', '2030-01-01')")
    with pytest.raises(StatusError, match="newer than this tfslurm"):
        check_schema()
    database.execute_sql("DELETE FROM schema_migration")
    with pytest.raises(StatusError, match="older than this tfslurm"):
        check_schema()
    database.execute_sql("DROP TABLE schema_migration")
    with pytest.raises(StatusError, match="older than this tfslurm"):
        check_schema()


def test_a_file_that_is_no_database_is_said_to_be_unreadable(installation):
    database.obj.close()
    installation.root.catalog.write_bytes(b"not a database " * 1000)
    for suffix in ("-wal", "-shm"):
        installation.root.catalog.with_name(f"catalog.db{suffix}").unlink(missing_ok=True)
    with pytest.raises(UnreachableError, match="the catalog cannot be read"):
        connect(installation.settings)


def test_a_write_transaction_is_never_nested(installation):
    with write_transaction():
        with pytest.raises(AssertionError, match="inside a transaction"), write_transaction():
            pass
    with write_transaction():
        Lease.create(name="x", holder="me", renewed_at=now(), expires_at=now())
    assert Lease.select().count() == 1


def test_a_writer_that_waits_too_long_says_who_is_to_blame(installation, monkeypatch):
    monkeypatch.setattr(db, "BUSY_TIMEOUT", 0.1)
    db.bind(installation.settings)
    other = sqlite3.connect(installation.root.catalog, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnreachableError, match="locked by another process"), write_transaction():
        pass
    other.execute("ROLLBACK")
    with write_transaction():
        pass


def test_a_catalog_that_is_read_only_is_not_permitted(installation):
    database.obj.close()
    database.initialize(SqliteDatabase(f"file:{installation.root.catalog}?mode=ro", uri=True))
    with pytest.raises(NotPermittedError, match="read-only"), write_transaction():
        Lease.create(name="x", holder="me", renewed_at=now(), expires_at=now())


READ_MODIFY_WRITE = """
import sys
from pathlib import Path
from tfslurm import settings
from tfslurm.catalog import db
from tfslurm.catalog.models import Lease
db.connect(settings.load(root=Path(sys.argv[1]), environ={}))
for _ in range(10):
    with db.write_transaction():
        row = Lease.get(Lease.name == "counter")
        Lease.update(holder=str(int(row.holder) + 1)).where(Lease.name == "counter").execute()
"""


def test_sixteen_processes_read_modify_and_write_without_losing_anything(installation):
    with write_transaction():
        Lease.create(name="counter", holder="0", renewed_at=now(), expires_at=now())
    command = [sys.executable, "-c", READ_MODIFY_WRITE, installation.root.path]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(16)]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 16, said
    assert Lease.get(Lease.name == "counter").holder == "160"


def test_what_is_referred_to_cannot_be_removed(installation):
    dataset = installation.dataset()
    with pytest.raises(IntegrityError), write_transaction():
        Artifact.delete().where(Artifact.id == dataset.artifact_id).execute()


def test_two_living_objects_of_a_kind_cannot_share_a_name_whatever_the_code_does(installation):
    row = installation.dataset().artifact
    values = {**row.__data__, "id": "ds-0000000000000000"}
    with pytest.raises(IntegrityError), write_transaction():
        Artifact.insert(values).execute()
    with write_transaction():
        Artifact.insert({**values, "status": "deleted"}).execute()
        Artifact.insert({**values, "id": "ckpt-0000000000000000", "kind": "checkpoint"}).execute()


def test_times_are_kept_to_the_microsecond_in_utc(installation):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    with write_transaction():
        Lease.create(name="x", holder="me", renewed_at=moment, expires_at=moment + timedelta(days=1))
    assert Lease.get(Lease.name == "x").renewed_at == moment


def test_events_are_numbered_in_the_order_of_their_transactions(installation):
    installation.dataset()
    assert [event.change for event in Event.select().order_by(Event.id)] == ["created", "ready"]


@pytest.mark.parametrize(("kind", "mode"), [("ext4", "WAL"), ("nfs4", "DELETE"), ("lustre", "DELETE"), ("", "WAL")])
def test_the_journal_fits_the_filesystem(installation, monkeypatch, kind, mode):
    monkeypatch.setattr(db, "filesystem", lambda folder: kind)
    assert db.journal_mode(installation.root.path) == mode
    migrate(installation.settings)
    assert database.execute_sql("PRAGMA journal_mode").fetchone()[0].upper() == mode


def test_the_filesystem_is_that_of_the_innermost_mount(tmp_path):
    assert db.filesystem(tmp_path) != ""
    assert db.filesystem(db.Path("/proc/self")) == "proc"


def test_many_rows_at_once_are_those_that_create_would_have_made(installation):
    at = now()
    rows = [
        {"uuid": f"u-{number}", "name": "a", "kind": "job", "object_id": f"job-{number}", "state": "submitting",
         "launcher": "slurm", "array_index": number, "created_at": at}
        for number in range(3)
    ]  # fmt: skip
    with write_transaction():
        insert_all(Submission, rows[:2])
        insert_all(Submission, [])
        Submission.create(**rows[2])
    made = list(Submission.select().order_by(Submission.uuid).dicts())
    assert [row.pop("array_index") for row in made] == [0, 1, 2]
    own = ("uuid", "object_id")
    shared = [{key: value for key, value in row.items() if key not in own} for row in made]
    assert shared[0] == shared[1] == shared[2]
    with pytest.raises(IntegrityError), write_transaction():
        insert_all(Submission, [{**rows[0], "uuid": "u-9"}, rows[1]])
    assert Submission.select().count() == 3
