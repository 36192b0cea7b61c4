"""The state from which a job goes on in another attempt, on any number of processes.

`resume/` holds `state.json` and the one file of tensors that it names. A new state is written beside the old one and
takes its place when `state.json` is renamed: killed anywhere, one of them is whole. Imports torch only to save.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.files import fsync_folder, write_atomic
from tfslurm.training.config import Hyperparameters, TrainingConfig
from tfslurm.training.progress import now

if TYPE_CHECKING:
    import torch

STATE = "state.json"


class DamagedState(InvalidError):
    """The saved state cannot be read, or is not the one that was written."""


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """What a run follows from: a state may only be used where all of it is the same."""

    dataset_digest: str
    base_model_revision: str
    base_model_digest: str
    hyperparameters: Hyperparameters
    seed: int
    steps: int
    """Of the whole plan."""
    validation_dataset_digest: str | None = None

    @classmethod
    def of(cls, config: TrainingConfig, steps: int) -> Basis:
        return cls(
            dataset_digest=config.dataset.digest,
            base_model_revision=config.base_model.revision,
            base_model_digest=config.base_model.digest,
            hyperparameters=config.hyperparameters,
            seed=config.seed,
            steps=steps,
            validation_dataset_digest=config.validation_dataset.digest if config.validation_dataset else None,
        )

    def fields(self) -> dict[str, str | int | float | None]:
        flat = msgspec.to_builtins(self)
        return flat.pop("hyperparameters") | flat


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The losses on the validation rows: the newest, and the lowest."""

    step: int
    loss: float
    best_step: int
    best_loss: float


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`state.json`: where the loop stood after `step` updates, and which file holds the tensors of that moment."""

    version: Literal[1] = 1
    attempt: int
    """The one that saved it."""
    step: int
    loss: float
    """Of the last update."""
    peak_memory_bytes: int
    updates: int
    """As the optimizer counts them."""
    world_size: int
    basis: Basis
    measured: Measured | None = None
    """The weights of its best step are among the tensors."""
    at: str = msgspec.field(default_factory=now)
    tensors: str = ""
    """The file's name; see masters.gather and validation.BEST for what is in it."""
    size: int = 0
    sha256: str = ""


def save(folder: Path, state: State, tensors: dict[str, torch.Tensor]) -> State:
    """Replace the state in `folder`; returns it with the name, size and digest of its file.

    Raises OSError where it cannot be written: the earlier state is as it was then.
    """
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)
    path = folder / f"attempt-{state.attempt}-step-{state.step}.safetensors"
    fault_point("resume-begun")
    size, digest = _write(path, tensors)
    fault_point("resume-tensors")
    state = msgspec.structs.replace(state, tensors=path.name, size=size, sha256=digest)
    write_atomic(folder / STATE, msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
    fault_point("resume-named")
    for other in folder.iterdir():
        if other.name not in (STATE, path.name):
            other.unlink()
    return state


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    fsync_folder(path.parent)
    return path.stat().st_size, digest


def read(folder: Path) -> State | None:
    """None where nothing was saved. Raises DamagedState where `state.json` is not one of ours."""
    try:
        return msgspec.json.decode((folder / STATE).read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise DamagedState(f"{folder / STATE} cannot be read: {error}") from error


def usable(folder: Path, basis: Basis) -> State | None:
    """The state to go on from: None where there is none, or only a damaged one, which is removed and told in the log.

    Raises InvalidError naming the field where the state is of a run on another basis.
    """
    try:
        state = read(folder)
        if state is None:
            return None
        require_same(state.basis, basis)
        _verify(folder, state)
    except DamagedState as error:
        print(f"WARNING: the saved state is damaged: {error}\nWARNING: starting again from step 0", flush=True)
        shutil.rmtree(folder)
        return None
    return state


def require_same(saved: Basis, wanted: Basis) -> None:
    """Raises InvalidError naming the first field that differs, and both values."""
    before = saved.fields()
    for field, value in wanted.fields().items():
        if before[field] != value:
            raise InvalidError(
                f"the saved state is of another run: its {field} is {before[field]}, and the job's is {value}",
                hint="start a new job",
            )


def _verify(folder: Path, state: State) -> None:
    path = folder / state.tensors
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DamagedState(f"{path} is missing") from None
    if found != state.sha256:
        raise DamagedState(f"{path} has the digest {found}, and {state.sha256} was written")


def barren(folder: Path, attempt: int) -> int:
    """How many attempts in a row before `attempt` ended without having saved anything."""
    try:
        state = read(folder)
    except DamagedState:
        return 0  # nobody knows; the trainer removes it, and tells
    return attempt if state is None else max(0, attempt - state.attempt - 1)


def require_fruit(folder: Path, attempt: int, limit: int) -> None:
    """Raises InvalidError where `limit` attempts in a row came to nothing: another one would hardly do better."""
    if (count := barren(folder, attempt)) >= limit:
        raise InvalidError(
            f"{count} attempts in a row ended before they had saved anything",
            hint="see the ends of their logs; where they ran out of time, take an instance with more of it",
        )
