"""The connection, and the one kind of transaction that writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peewee import Database, OperationalError, PeeweeException, SqliteDatabase

from tfslurm.catalog import migrations
from tfslurm.catalog.models import database
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
