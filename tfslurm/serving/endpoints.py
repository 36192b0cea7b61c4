"""Inference endpoints: created, stopped, deleted."""

from __future__ import annotations

import secrets
import signal
import socket
from dataclasses import dataclass

from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.references import BaseModelRef, CheckpointRef
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Checkpoint, Endpoint, EndpointStatus, Submission, now
from tfslurm.catalog.views import digest_of
from tfslurm.errors import InvalidError, StatusError
from tfslurm.files import locked, read_json, write_atomic
from tfslurm.identity import check_name, current_user, new_id
from tfslurm.paths import Root
from tfslurm.serving.config import ServingConfig
from tfslurm.settings import Instance, Settings
from tfslurm.slurm import local, submissions
from tfslurm.slurm.client import Slurm

NODE_BIND = "0.0.0.0"
"""On a cluster the engine answers other nodes; the key is asked for."""


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    name: str
    checkpoint: str
    instance: str | None = None
    max_context: int | None = None
    precision: str = "auto"
    quantization: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that an endpoint would be made of; making one changes nothing."""

    config: ServingConfig
    instance: Instance
    uuid: str
    script: str


def plan(settings: Settings, request: Request) -> Plan:
    """Render the whole endpoint.

    Raises NotFoundError for an unknown checkpoint or instance, StatusError for a checkpoint that was deleted,
    InvalidError where the base model cannot serve the context.
    """
    checkpoint = queries.find_checkpoint(request.checkpoint)
    instance = settings.instance(request.instance or settings.site.serving.instance, "serving")
    endpoint_id = new_id("endpoint")
    config = ServingConfig(
        endpoint_id=endpoint_id,
        name=check_name(request.name),
        checkpoint=CheckpointRef.of(checkpoint),
        base_model=_model_ref(checkpoint),
        max_context=_context(checkpoint, request.max_context, settings.site.serving.max_context),
        precision=request.precision,
        quantization=request.quantization,
        tensor_parallel=instance.gpus_per_node or 1,
        threads=instance.cpus_per_process * instance.processes_per_node,
        bind="127.0.0.1" if instance.launcher == "local" else NODE_BIND,
        port=_free_port(settings.root) if instance.launcher == "local" else 0,
        cache=str(settings.root.cache / "vllm"),
        start_timeout=settings.site.serving.start_timeout,
        engine_options=instance.engine_options,
    )
    if config.name == config.base_model.name:
        raise InvalidError(f"an endpoint cannot be called like its base model, '{config.name}'")
    paths = settings.root.endpoint(endpoint_id)
    uuid, script = submissions.script_for(settings, "serve", instance, paths, "endpoint", endpoint_id)
    return Plan(config, instance, uuid, script)


def _model_ref(checkpoint: Checkpoint) -> BaseModelRef:
    model = checkpoint.base_model
    if model.revision != checkpoint.base_model_revision:
        raise InvalidError(
            f"checkpoint '{checkpoint.artifact.name}' was trained on revision {checkpoint.base_model_revision} "
            f"of '{model.name}'; the one that is staged is {model.revision}"
        )
    return BaseModelRef.of(model)


def _context(checkpoint: Checkpoint, asked: int | None, default: int) -> int:
    longest = checkpoint.base_model.metadata.get("max_position_embeddings") or default
    if asked and asked > longest:
        raise InvalidError(f"max-context {asked} is more than the {longest} tokens that the base model takes")
    return asked or min(default, longest)


def _free_port(root: Root) -> int:
    """A port that is free now and that no endpoint of this root keeps for itself."""
    alive = Endpoint.select(Endpoint.id).where(Endpoint.status != EndpointStatus.DELETED)
    kept = {(read_json(root.endpoint(row.id).config) or {}).get("port") for row in alive}
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in kept:
            return port


def create(settings: Settings, made: Plan) -> tuple[Endpoint, str]:
    """Write what was planned, register the endpoint and submit it; the endpoint and its API key.

    Raises StatusError where the name is taken or the checkpoint deleted: nothing is left then; SlurmRefused with
    the endpoint in error; SlurmUnreachable with the endpoint pending: `sync` submits it.
    """
    paths = settings.root.endpoint(made.config.endpoint_id)
    key = f"tfs-{secrets.token_urlsafe(32)}"
    paths.logs.mkdir(parents=True)
    write_atomic(paths.config, made.config.encode(), mode=0o444)
    write_atomic(paths.key, key, mode=0o600)
    write_atomic(paths.script, made.script, mode=0o555)
    try:
        with write_transaction():
            endpoint, submission = _insert(settings.root, made)
    except BaseException:
        remove_tree(paths.folder)
        raise
    submissions.hand_over(settings, submission, paths.script, lambda reason: _refuse(endpoint, reason))
    return endpoint, key


def _refuse(endpoint: Endpoint, reason: str) -> None:
    transition(endpoint, EndpointStatus.ERROR, actor=current_user(), reason=reason, error=reason, ended_at=now())


def start(settings: Settings, endpoint: Endpoint) -> Endpoint:
    """Serve again what was stopped or failed: the same name, key and, on the local launcher, URL.

    Raises StatusError where it runs, NotFoundError where its checkpoint was deleted.
    """
    paths = settings.root.endpoint(endpoint.id)
    with locked(paths.folder / ".lock-start"):
        endpoint = queries.find_endpoint(endpoint.id)
        if not EndpointStatus(endpoint.status).ended:
            raise StatusError(f"endpoint '{endpoint.name}' is {endpoint.status} already")
        instance = settings.instance(endpoint.instance, "serving")
        uuid, script = submissions.script_for(settings, "serve", instance, paths, "endpoint", endpoint.id)
        # The last run's reports go first: read together with the new row, they would end the new run.
        for report in (paths.stop, paths.started, paths.exit, paths.outcome, paths.state):
            report.unlink(missing_ok=True)
        write_atomic(paths.script, script, mode=0o555)
        with write_transaction():
            queries.find_checkpoint(endpoint.checkpoint.artifact_id)
            transition(
                endpoint, EndpointStatus.PENDING, actor=current_user(), error=None, started_at=None, ended_at=None
            )
            submission = submissions.record(uuid, instance, "endpoint", endpoint.id)
    submissions.hand_over(settings, submission, paths.script, lambda reason: _refuse(endpoint, reason))
    return endpoint


def _insert(root: Root, made: Plan) -> tuple[Endpoint, Submission]:
    config = made.config
    # The endpoint's row is what keeps the checkpoint from being deleted: both are decided under one lock.
    checkpoint = queries.find_checkpoint(config.checkpoint.id)
    queries.check_name_free(Endpoint, "endpoint", config.name)
    endpoint = Endpoint.create(
        id=config.endpoint_id,
        name=config.name,
        status=EndpointStatus.PENDING.value,
        url=f"http://{config.bind}:{config.port}/v1" if config.port else None,
        checkpoint=checkpoint,
        instance=made.instance.name,
        config_digest=digest_of(config.encode()),
        owner=current_user(),
        created_at=now(),
    )
    record(endpoint, "created", actor=current_user(), after=EndpointStatus.PENDING)
    return endpoint, submissions.record(made.uuid, made.instance, "endpoint", endpoint.id)


def stop(settings: Settings, endpoint: Endpoint) -> Endpoint:
    """Let the engine finish what it is answering, and leave. Raises StatusError where it has ended already."""
    if EndpointStatus(endpoint.status).ended:
        raise StatusError(f"endpoint '{endpoint.name}' has ended already: it is {endpoint.status}")
    if endpoint.status != EndpointStatus.STOPPING:
        with write_transaction():
            transition(endpoint, EndpointStatus.STOPPING, actor=current_user(), reason="stop requested")
    settings.root.endpoint(endpoint.id).stop.touch()
    submission = queries.submissions_of([endpoint.id]).get(endpoint.id)
    if submission and submission.job_id:
        end(settings, submission)
    return endpoint


def end(settings: Settings, submission: Submission) -> None:
    """Ask the supervisor to leave. Raises SlurmUnreachable."""
    if submission.launcher == "local":
        local.end(submission.job_id, signal.SIGTERM)
    else:
        Slurm(settings.site.slurm.command_timeout).cancel(submission.job_id)


def delete(endpoint: Endpoint) -> Endpoint:
    """Hide a stopped endpoint and free its name. Raises StatusError while it runs."""
    if not EndpointStatus(endpoint.status).ended:
        raise StatusError(f"endpoint '{endpoint.name}' is {endpoint.status}", hint="Stop it first.")
    with write_transaction():
        transition(endpoint, EndpointStatus.DELETED, actor=current_user())
    return endpoint
