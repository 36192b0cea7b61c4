"""Take a checkpoint out of the factory: its verified bytes, or a whole model, with a card that states the lineage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Entry, Manifest, Progress
from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog.models import BaseModel, Checkpoint, CheckpointStatus, Dataset
from tfslurm.catalog.views import rendered
from tfslurm.errors import InvalidError, NotFoundError, NotPermittedError, StatusError
from tfslurm.faults import fault_point
from tfslurm.files import fsync_folder, locked, write_atomic
from tfslurm.settings import Settings
from tfslurm.training.config import TrainingConfig
from tfslurm.training.model_card import Origin, model_card
from tfslurm.training.programs import ask
from tfslurm.training.staging import settle

CARD = "README.md"
TEMPORARY = ".tfslurm-export-"
"""What the folder beside the destination is called, before its name, as long as the export grows."""
BLOCK = 1024 * 1024


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Which folders are merged into which, an empty one."""

    base: str
    adapter: str
    destination: str


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How well a merged model, read back, agrees with base and adapter: differences of log-probabilities, in nats.

    All are means over `tokens`; `distance` is between the merged model and the two, `effect` between the two and the
    base alone.
    """

    dtype: str
    tokens: int
    distance: float
    effect: float
    tolerance: float


@dataclass(frozen=True)
class Exported:
    """What now lies at the destination; `digest` is that of its manifest."""

    destination: Path
    digest: str
    size: int
    files: int
    agreement: Agreement | None
    """Of a merged model."""


def export(
    settings: Settings,
    checkpoint: Checkpoint,
    destination: Path,
    *,
    merged: bool = False,
    progress: Callable[[str], Progress] = lambda label: lambda done, total: None,
) -> Exported:
    """Write the checkpoint to `destination`: a PEFT adapter, or merged into its base a model that needs no PEFT.

    The destination appears whole or not at all; what a killed export left beside it is removed by the next one.
    `progress` makes a callback for (bytes done, of bytes) from a label. Merging runs in the training environment,
    on this machine, and takes 4 bytes of memory a parameter.

    Raises StatusError where something is at the destination, where another export is writing it, or where the bytes
    are gone; InvalidError where bytes are not those of the manifest, or where the merged model isn't the same.
    """
    destination = destination.expanduser().absolute()
    _check_exportable(checkpoint)
    check_free(destination)
    card = _card(settings, checkpoint, merged)
    with _growing(destination) as folder:
        agreement = None
        if merged:
            agreement = _merge(settings, checkpoint, folder, progress)
        else:
            _copy(checkpoint, folder, progress("Exporting"))
        write_atomic(folder / CARD, card)
        listed = manifest.build(folder)
        manifest.write(listed, folder)
        settle(folder, _umask())
        fault_point("export-settled")
        _publish(folder, destination)
        fault_point("export-renamed")
    return Exported(destination, listed.digest, listed.size, len(listed.entries), agreement)


def _umask() -> int:
    """What the user's own files are made with: there is no other way to ask for it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_free(destination: Path) -> None:
    """Raises StatusError where something is there, NotFoundError where there is no folder to put it into."""
    if not destination.parent.is_dir():
        raise NotFoundError(f"{destination.parent}: no such folder", hint="Make it first.")
    if os.path.lexists(destination) and not _is_empty_folder(destination):
        raise StatusError(f"{destination} exists already", hint="Give a new folder, or an empty one.")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _check_exportable(checkpoint: Checkpoint) -> None:
    registered = checkpoint.artifact
    if registered.status != CheckpointStatus.READY:
        raise StatusError(f"checkpoint '{registered.name}' is {registered.status}")


@contextmanager
def _growing(destination: Path) -> Iterator[Path]:
    """An empty folder beside the destination, this process's alone; gone at the end, with all that is left in it."""
    around = destination.with_name(f"{TEMPORARY}{destination.name}")
    try:
        around.mkdir(mode=0o700, exist_ok=True)
        with locked(around / "lock", wait=False):
            folder = around / "files"
            remove_tree(folder)
            folder.mkdir()
            try:
                yield folder
            finally:
                remove_tree(folder)
    except BlockingIOError:
        raise StatusError(f"another export to {destination} is running") from None
    except PermissionError as error:
        raise NotPermittedError(f"{error.filename}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # where it is not empty, another export is at work in it
            around.rmdir()


def _publish(folder: Path, destination: Path) -> None:
    try:
        os.rename(folder, destination)
    except OSError as error:
        raise StatusError(f"{destination} was made by something else in the meantime: {error.strerror}") from error
    fsync_folder(destination.parent)


def _copy(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Copy what the manifest lists, comparing on the way. The card is written anew."""
    source = Path(checkpoint.artifact.location)
    listed = _manifest(source, checkpoint.artifact.digest)
    manifest.check_names(source, listed)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, listed.size)

    for entry in listed.entries:
        _copy_file(source, entry, folder, count)
        fault_point("export-file-copied")


def _manifest(folder: Path, digest: str) -> Manifest:
    found = manifest.read(folder)
    if found.digest != digest:
        raise InvalidError(f"{folder / manifest.MANIFEST}: its digest is {found.digest}, not {digest} as recorded.")
    return found


def _copy_file(source: Path, entry: Entry, folder: Path, on_read: Callable[[int], None]) -> None:
    target, digest = folder / entry.path, hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source / entry.path, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        while block := old.read(BLOCK):
            digest.update(block)
            new.write(block)
            on_read(len(block))
    if digest.hexdigest() != entry.sha256:
        raise InvalidError(
            f"{source / entry.path}: its bytes have changed", hint="These are not the bytes of its manifest."
        )


def _merge(settings: Settings, checkpoint: Checkpoint, folder: Path, progress: Callable[[str], Progress]) -> Agreement:
    """Only what was verified is merged: the base model's bytes are read for that, too."""
    registered, base = checkpoint.artifact, _base_model(checkpoint)
    manifest.verify_folder(Path(registered.location), registered.digest)
    manifest.verify_folder(Path(base.location), base.digest, progress=progress("Verifying the base model"))
    question = Question(base=base.location, adapter=registered.location, destination=str(folder))
    return ask(settings, "tfslurm.training.merging", question=question, answer=Agreement)


def _base_model(checkpoint: Checkpoint) -> BaseModel:
    base = BaseModel.get_or_none(BaseModel.name == checkpoint.base_model_id)
    if base is None or base.revision != checkpoint.base_model_revision:
        staged = f"the one that is staged is {base.revision}" if base else "it is no longer staged"
        raise StatusError(
            f"checkpoint '{checkpoint.artifact.name}' was trained on revision {checkpoint.base_model_revision} of "
            f"'{checkpoint.base_model_id}'; {staged}"
        )
    return base


def _card(settings: Settings, checkpoint: Checkpoint, merged: bool) -> str:
    job, told = checkpoint.job, checkpoint.metadata
    config = msgspec.convert(rendered(settings.root.job(job.id).config, job.config_digest), TrainingConfig)
    base = BaseModel.get_or_none(BaseModel.name == checkpoint.base_model_id)
    dataset = Dataset.get_or_none(Dataset.artifact == job.dataset_id)
    origin = Origin(
        checkpoint=checkpoint.artifact.name,
        checkpoint_id=checkpoint.artifact_id,
        digest=checkpoint.artifact.digest,
        base_source=base.source if base else None,
        dataset_source=dataset.source if dataset else None,
    )
    return model_card(config, steps=told["steps"], loss=told["final_loss"], origin=origin, merged=merged)
