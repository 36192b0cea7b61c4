"""Checkpoints: deleted once nothing serves them, and restored while their bytes are there."""

from __future__ import annotations

from tfslurm.artifacts.restore import bring_back
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Checkpoint, CheckpointStatus, now
from tfslurm.errors import StatusError
from tfslurm.identity import current_user


def delete(checkpoint: Checkpoint) -> Checkpoint:
    """Soft-delete a checkpoint. Raises StatusError naming the endpoints that serve it."""
    with write_transaction():
        checkpoint = queries.find_checkpoint(checkpoint.artifact_id, deleted=True)
        if checkpoint.artifact.status == CheckpointStatus.DELETED:
            return checkpoint
        serving = queries.consumers_of_checkpoint(checkpoint.artifact_id)
        if serving:
            listed = ", ".join(f"endpoint '{endpoint.name}' ({endpoint.status})" for endpoint in serving)
            raise StatusError(f"checkpoint '{checkpoint.artifact.name}' is in use: {listed}", hint="Stop them first.")
        transition(checkpoint.artifact, CheckpointStatus.DELETED, actor=current_user(), deleted_at=now())
    return checkpoint


def restore(checkpoint: Checkpoint, name: str | None = None) -> Checkpoint:
    """Take a deletion back, as `name` if given; raises what `datasets.registry.restore` raises."""
    with write_transaction():
        checkpoint = queries.find_checkpoint(checkpoint.artifact_id, deleted=True)
        bring_back(checkpoint.artifact, name)
    return checkpoint
