"""The connection, and the one kind of transaction that writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peewee import Database, Field, OperationalError, PeeweeException, SqliteDatabase, __exception_wrapper__

from tfslurm.catalog import migrations
from tfslurm.catalog.models import Table, database
from tfslurm.errors import NotPermittedError, StatusError, UnreachableError
from tfslurm.settings import Settings

BUSY_TIMEOUT = 30
"""Seconds that a writer waits for another one."""

PRAGMAS = {"foreign_keys": 1, "synchronous": "full"}

MIGRATIONS = Path(migrations.__file__).parent


def connect(settings: Settings) -> Database:
    """Open the catalog and bind the tables to it.

    Raises UnreachableError where there is none, StatusError where its schema is not this version's.
    """
    path = settings.root.catalog
    if not path.exists():
        raise UnreachableError(
            f"no catalog at {path}", hint="Make one with `tfslurm init`, or name another root with --root."
        )
    bind(settings)
    check_schema()
    return database.obj


def bind(settings: Settings) -> None:
    """Point the tables at the catalog's database; what was bound before is closed."""
    if database.obj is not None and not database.obj.is_closed():
        database.obj.close()
    database.initialize(SqliteDatabase(settings.root.catalog, pragmas=PRAGMAS, timeout=BUSY_TIMEOUT))


def check_schema() -> None:
    """Raises StatusError unless exactly the migrations that ship with this version were applied."""
    known = {path.stem for path in MIGRATIONS.glob("[0-9]*.py")}
    try:
        applied = {name for (name,) in database.execute_sql("SELECT name FROM schema_migration")}
    except PeeweeException as error:
        if "no such table" not in str(error):
            raise UnreachableError(f"the catalog cannot be read: {error}") from None
        applied = set()
    if known - applied:
        raise StatusError("the catalog's schema is older than this tfslurm", hint="Run `tfslurm init`.")
    if applied - known:
        raise StatusError("the catalog's schema is newer than this tfslurm", hint="Upgrade tfslurm.")


@contextmanager
def write_transaction() -> Iterator[None]:
    """A transaction that holds the write lock from its start, so that what it reads stays true until it commits.

    Never nested: peewee would turn the inner one into a savepoint without the lock.
    Raises UnreachableError where another process keeps the lock, NotPermittedError for a read-only catalog.
    """
    assert database.transaction_depth() == 0, "write_transaction() inside a transaction"
    try:
        with database.atomic("IMMEDIATE"):
            yield
    except OperationalError as error:
        if "readonly" in str(error):
            raise NotPermittedError("the catalog is read-only for you") from None
        if "locked" in str(error):
            raise UnreachableError(f"the catalog was locked by another process for {BUSY_TIMEOUT} s") from None
        raise


def insert_all(table: type[Table], rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert many rows, each with the same fields; those that are left out take their defaults.

    One prepared statement: peewee's insert_many takes five times as long, for making its SQL.
    """
    rows, meta = list(rows), table._meta
    if not rows:
        return
    given = [field for field in meta.sorted_fields if field in meta.defaults or field.name in rows[0]]
    columns = ", ".join(f'"{field.column_name}"' for field in given)
    places = ", ".join([database.param] * len(given))
    values = zip(*(_column(field, rows) for field in given), strict=True)
    execute_many(f'INSERT INTO "{meta.table_name}" ({columns}) VALUES ({places})', values)


def execute_many(sql: str, rows: Iterable[Sequence[Any]]) -> None:
    """One prepared statement for many rows; raises peewee's errors, as every other statement does."""
    with __exception_wrapper__:
        database.cursor().executemany(sql, rows)


def _column(field: Field, rows: list[Mapping[str, Any]]) -> list[Any]:
    """The field's values as the database takes them; what all rows share is converted once."""
    if field.name not in rows[0]:
        return [field.db_value(_default(field))] * len(rows)
    values: list[Any] = []
    before = converted = None
    for row in rows:
        value = row[field.name]
        if value is not before:
            before, converted = value, field.db_value(value)
        values.append(converted)
    return values


def _default(field: Field) -> Any:
    return field.default() if callable(field.default) else field.default


def migrate(settings: Settings) -> list[str]:
    """Make the catalog, or bring it to this version's schema; the names of the steps taken.

    The whole of it happens under the database's own write lock, taken by each step: two at once do no harm.
    """
    from playhouse.migrations import Runner

    bind(settings)
    database.execute_sql(f"PRAGMA journal_mode={journal_mode(settings.root.path)}")
    return Runner(database.obj, str(MIGRATIONS)).up()


def journal_mode(folder: Path) -> str:
    """WAL where every process is on one host; DELETE on a network filesystem, where WAL loses data.

    https://www.sqlite.org/wal.html, section 1.
    """
    return "DELETE" if filesystem(folder) in NETWORK_FILESYSTEMS else "WAL"


NETWORK_FILESYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 afs 9p ceph fuse.ceph glusterfs fuse.glusterfs fuse.sshfs "
    "lustre gpfs beegfs pvfs2 wekafs vastfs".split()
)
"""As /proc/self/mountinfo names them."""


def filesystem(folder: Path) -> str:
    """The type of the filesystem that holds `folder`, as the kernel names it; "" where it does not say."""
    best, kind = "", ""
    target = str(folder.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        point = fields[4].encode().decode("unicode_escape")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[fields.index("-") + 1]
    return kind
