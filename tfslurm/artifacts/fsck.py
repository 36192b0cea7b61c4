"""The catalog against the bytes: what is there without a row, what a row says that is not there, and the cure.

    orphan   a folder without a row                           --repair moves it into the trash
    missing  a row without its folder                         --repair takes it from the trash, if it is there
    damaged  a manifest or file that is not the row's         no cure but a backup
    stale    what `reclaim` should have taken a day ago       --repair moves it into the trash
    status   rows that cannot all be true                     --repair ends them, or lets `sync` look again

Folders and rows younger than a day are left out where a command may still be at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from tfslurm.artifacts import manifest, trash
from tfslurm.artifacts.leftovers import Leftover, leftovers, names_in, never_ran
from tfslurm.artifacts.manifest import verify_folder
from tfslurm.artifacts.reclaim import move_away
from tfslurm.artifacts.restore import check_sealed
from tfslurm.artifacts.trash import changed
from tfslurm.catalog import needs
from tfslurm.catalog.contradictions import contradictions
from tfslurm.catalog.models import Artifact, BaseModel, Dataset, Endpoint, EndpointStatus, Job, Table, now
from tfslurm.catalog.views import rendered
from tfslurm.errors import InvalidError, TfslurmError
from tfslurm.identity import job_id_of
from tfslurm.paths import LOCK, STAGING, Root
from tfslurm.settings import Settings

MARGIN = timedelta(days=1)
"""What is younger may be in the making, and what is due for less may wait for tonight's `reclaim`."""

BACKUP = "Restore it from a backup, or delete it and register it anew."

Check = Literal["orphan", "missing", "damaged", "stale", "status"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and its cure."""

    check: Check
    ref: str
    """An object's id or name, or a path below the root."""
    said: str
    cure: str
    mend: Callable[[], str] | None = None
    """Mends it and says what it did; None where nothing can be done safely."""


@dataclass(frozen=True)
class Mended:
    """What a repair came to."""

    finding: Finding
    done: str | None
    """What was done; None where it is left wrong."""
    why: str | None = None
    """Why it could not be mended."""


def examine(settings: Settings, *, full: bool = False, at: datetime | None = None) -> Iterator[Finding]:
    """Everything that is wrong, read-only; with `full`, every byte of every artifact and base model is read."""
    at = at or now()
    yield from _orphans(settings.root, at)
    yield from _sealed(settings.root, full)
    yield from _assembling(settings.root)
    yield from _models(full)
    yield from _runs(settings.root)
    yield from _stale(settings, at)
    for found in contradictions():
        yield Finding("status", found.ref, found.said, found.cure, found.mend)


def repair(finding: Finding) -> Mended:
    """Mend one finding, if that is safe."""
    if finding.mend is None:
        return Mended(finding, None)
    try:
        return Mended(finding, finding.mend())
    except (TfslurmError, OSError) as error:
        return Mended(finding, None, str(error))


def _orphans(root: Root, at: datetime) -> Iterator[Finding]:
    alive = needs.alive()
    names = {folder: names_in(root.path / folder) for folder in ("datasets", "assembling", "imports", "checkpoints")}
    names |= {folder: names_in(root.path / folder) for folder in ("jobs", "endpoints", "models")}
    artifacts = {row.id for row in Artifact.select(Artifact.id)}
    jobs = {row.id for row in Job.select(Job.id)}
    known = dict.fromkeys(("datasets", "assembling", "imports", "checkpoints"), artifacts)
    known |= {"jobs": jobs, "endpoints": {row.id for row in Endpoint.select(Endpoint.id)}}
    known["models"] = {row.name for row in BaseModel.select(BaseModel.name)}
    for folder, found in names.items():
        for name in found:
            plain = name.removeprefix(STAGING)
            of_job = folder == "checkpoints" and job_id_of(plain) in jobs  # registered by `sync`, or left over
            partial_model = folder == "models" and name != plain
            if plain in known[folder] or plain in alive or of_job or partial_model or name.startswith(LOCK):
                continue
            path = root.path / folder / name
            if at - changed(path) > MARGIN and not _holds_nothing(path):
                yield _orphan(root, path, at)


def _holds_nothing(path: Path) -> bool:
    """What a command left over that was killed before it wrote its row: `reclaim` takes it."""
    if path.parent.name in ("imports", "jobs", "endpoints"):
        return never_ran(path)
    return path.parent.name == "assembling" and path.is_dir() and not any(path.iterdir())


def _orphan(root: Root, path: Path, at: datetime) -> Finding:
    ref = str(path.relative_to(root.path))
    cure = "If the catalog is older than the files, restore it; else --repair moves them into the trash."
    return Finding("orphan", ref, "no row speaks of it", cure, lambda: _discard(root, path, at))


def _discard(root: Root, path: Path, at: datetime) -> str:
    trash.discard(root, path, at)
    return "is in the trash"


def _sealed(root: Root, full: bool) -> Iterator[Finding]:
    for row in Artifact.select().where(Artifact.status == "ready").order_by(Artifact.id).iterator():
        finding = _check_sealed(root, row, full)
        # It may have been deleted since the row was read.
        if finding and Artifact.get_by_id(row.id).status == "ready":
            yield finding


def _check_sealed(root: Root, row: Artifact, full: bool) -> Finding | None:
    if not Path(row.location).is_dir():
        found = _in_trash(root, row)
        said = f"{row.kind} '{row.name}' is ready, and {row.location} is not there"
        if found is None:
            return Finding("missing", row.id, said, BACKUP)
        cure = f"It is in the trash as {found.path.name}: --repair puts it back."
        return Finding("missing", row.id, said, cure, lambda: _put_back(root, found))
    try:
        check_sealed(row)
        if full:
            verify_folder(Path(row.location), row.digest)
    except InvalidError as error:
        return Finding("damaged", row.id, f"{row.kind} '{row.name}': {error.message}", BACKUP)
    return None


def _in_trash(root: Root, row: Artifact) -> trash.Entry | None:
    """The trash's entry with just the row's bytes."""
    for entry in trash.entries(root):
        if entry.name == row.id and entry.folder == Path(row.location).parent.name:
            try:
                if manifest.read(entry.path).digest == row.digest:
                    return entry
            except InvalidError:
                continue  # half emptied: not what is looked for
    return None


def _put_back(root: Root, entry: trash.Entry) -> str:
    trash.take_out(root, entry)
    return "is back from the trash"


def _assembling(root: Root) -> Iterator[Finding]:
    rows = Artifact.select().join(Dataset).where(Artifact.status == "assembling", Dataset.source.is_null())
    for row in rows:
        folder = root.assembling(row.id)
        if not folder.is_dir() and Artifact.get_by_id(row.id).status == "assembling":
            said = f"dataset '{row.name}' is assembling, and {folder} is not there"
            cure = "Its files are lost: --repair makes the folder anew, to write them again."
            yield Finding("missing", row.id, said, cure, lambda folder=folder: _make(folder))


def _make(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return "has an empty folder"


def _models(full: bool) -> Iterator[Finding]:
    for row in BaseModel.select().order_by(BaseModel.name):
        folder = Path(row.location)
        if not folder.is_dir():
            yield Finding("missing", row.name, f"base model '{row.name}': {folder} is not there", BACKUP)
            continue
        try:
            listed = manifest.read(folder)
            if listed.digest != row.digest:
                raise InvalidError(f"{folder}: its manifest's digest is {listed.digest}, not {row.digest}")
            manifest.check_names(folder, listed)
            if full:
                verify_folder(folder, row.digest)
        except InvalidError as error:
            yield Finding("damaged", row.name, f"base model '{row.name}': {error.message}", BACKUP)


def _runs(root: Root) -> Iterator[Finding]:
    """Jobs and endpoints: their rendered configuration is the one record of what was run."""
    for row in Job.select().order_by(Job.id).iterator():
        yield from _check_record(row, root.job(row.id).config)
    for row in Endpoint.select().where(Endpoint.status != EndpointStatus.DELETED).order_by(Endpoint.id).iterator():
        yield from _check_record(row, root.endpoint(row.id).config)


def _check_record(row: Table, config: Path) -> Iterator[Finding]:
    try:
        rendered(config, row.config_digest)
    except InvalidError as error:
        check = "damaged" if config.exists() else "missing"
        yield Finding(check, row.id, f"'{row.name}': {error.message}", "Restore the file from a backup.")


def _stale(settings: Settings, at: datetime) -> Iterator[Finding]:
    for found in leftovers(settings):
        if found.due < at - MARGIN:
            ref, cure = str(found.path.relative_to(settings.root.path)), "Run `tfslurm reclaim`, or --repair."
            yield Finding("stale", ref, found.reason, cure, lambda found=found: _move(settings, found, at))


def _move(settings: Settings, found: Leftover, at: datetime) -> str:
    refusal = move_away(settings, found, at)
    return f"stays: {refusal}" if refusal else "is in the trash"
