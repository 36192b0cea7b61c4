"""An attempt's first step on the node: tokenize the dataset, unless that was done, and plan the run.

`python -m tfslurm.training.prepare JOBFOLDER`, one process, never under the distributed launcher.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from tfslurm.artifacts.identity import verify_quick
from tfslurm.artifacts.references import DatasetRef
from tfslurm.datasets.formats import Row, read_rows
from tfslurm.errors import InvalidError
from tfslurm.paths import JobPaths
from tfslurm.training import caps
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.config import TrainingConfig
from tfslurm.training.masks import Encoded, Rejected, RowEncoder
from tfslurm.training.outcome import has_succeeded, reporting
from tfslurm.training.plan import Plan, make_plan
from tfslurm.training.prepared import Prepared, PreparedValidation
from tfslurm.training.ranks import attempt_number, planned_processes
from tfslurm.training.resume import require_fruit
from tfslurm.training.schedule import validation_points
from tfslurm.training.selection import Selection, select, split
from tfslurm.training.tokens import Source, TokenFile, write_tokens

BATCH = 512
"""Rows that are tokenized together: enough for the tokenizer's threads, and bounded in memory."""


def prepare(paths: JobPaths, environment: Mapping[str, str]) -> Prepared:
    """Verify the dataset, tokenize it, plan the run; writes plan.npz and then prepared.json.

    The plan is for as many processes as `environment` says that will run. Raises InvalidError
    where the bytes are not those that were sealed, or no row can be trained on.
    """
    config = TrainingConfig.read(paths.config)
    usable = _usable(config, config.dataset, "dataset")
    training, kept = _keep_for_validation(config, usable)
    world_size = planned_processes(environment, config.processes.world_size)
    capacity = caps.capacity(paths.cap, config.trainer.micro_batch_tokens)
    plan = _plan(config, training.selection, world_size, capacity)
    plan.save(paths.plan)
    measured = _plan_validation(config, paths, kept, plan) if kept else None
    prepared = _summary(paths, training.tokens, training.selection, plan, measured)
    prepared.write(paths.prepared)
    _tell(prepared)
    return prepared


@dataclass(frozen=True)
class _Usable:
    """Rows of a token file."""

    tokens: TokenFile
    selection: Selection


def _usable(config: TrainingConfig, dataset: DatasetRef, what: str) -> _Usable:
    """The rows of `dataset` that are left, tokenized. Raises InvalidError where there are none."""
    _verify(config, dataset)
    tokens = tokenize(dataset, Path(config.base_model.path), Path(config.tokens))
    limit = config.hyperparameters.max_seq_length
    selection = select(tokens, limit, config.trainer.overlong)
    if len(selection.kept) == 0:
        hint = "check the dataset's format and field map, or raise max_seq_length"
        raise InvalidError(_nothing_left(what, tokens, selection, limit), hint=hint)
    return _Usable(tokens, selection)


def _keep_for_validation(config: TrainingConfig, usable: _Usable) -> tuple[_Usable, _Usable | None]:
    """What is trained on, and what the loss is measured on: a dataset of its own, some of the rows, or nothing."""
    if config.validation_dataset:
        return usable, _usable(config, config.validation_dataset, "validation dataset")
    if not config.trainer.validation_split:
        return usable, None
    training, kept = split(usable.selection, len(usable.tokens), config.trainer.validation_split, config.seed)
    return _Usable(usable.tokens, training), _Usable(usable.tokens, kept)


def _plan_validation(config: TrainingConfig, paths: JobPaths, kept: _Usable, training: Plan) -> PreparedValidation:
    """One step that takes all the rows, for the same processes and with the same cap."""
    selection, dataset = kept.selection, config.validation_dataset
    everything = msgspec.structs.replace(config.hyperparameters, epochs=1, effective_batch_size=len(selection.kept))
    config = msgspec.structs.replace(config, hyperparameters=everything)
    plan = _plan(config, selection, training.world_size, training.capacity)
    plan.save(paths.validation_plan)
    return PreparedValidation(
        tokens=str(kept.tokens.path),
        plan=str(paths.validation_plan),
        points=validation_points(training.steps, config.trainer.validations),
        rows=len(selection.kept),
        token_count=int(plan.tokens.sum()),
        supervised_count=int(plan.supervised.sum()),
        truncated=selection.truncated,
        dropped=selection.dropped,
        rejected=kept.tokens.rejected if dataset else {},
    )


def _verify(config: TrainingConfig, dataset: DatasetRef) -> None:
    """Its bytes are read where its files are not those of the last full verification, or that is too long ago."""
    identities = Path(config.tokens).with_name("identities") / f"{dataset.id}.json"
    max_age = config.trainer.verify_days * 86400
    read = verify_quick(Path(dataset.path), dataset.digest, identities, max_age)
    how = "all bytes read" if read else "the files are those of the last full verification"
    print(f"dataset {dataset.name} verified ({how}): {dataset.digest}", flush=True)


def tokenize(dataset: DatasetRef, model: Path, cache: Path) -> TokenFile:
    """The token file of `dataset` for the model in folder `model`; made in `cache` unless it is there."""
    tokenizer = BaseTokenizer(model)
    source = Source(
        dataset_digest=dataset.digest,
        tokenizer_hash=tokenizer.hash,
        template_hash=tokenizer.template_hash,
        format=dataset.format,
        field_map=dataset.field_map,
    )
    path = cache / source.file_name
    if path.exists():
        _note_use(path)
    else:
        started = time.monotonic()
        rows = read_rows(Path(dataset.path), dataset.format, dataset.field_map)
        write_tokens(path, encode_rows(tokenizer, rows), source, tokenizer.size)
        print(f"tokenized in {time.monotonic() - started:.1f} s: {path}", flush=True)
    return TokenFile(path)


def _note_use(path: Path) -> None:
    """Let the file's time be that of its last use: `reclaim` takes those that nobody used for long."""
    try:
        os.utime(path)
    except PermissionError:
        pass  # another user's: only its age counts then


def encode_rows(tokenizer: BaseTokenizer, rows: Iterable[Row]) -> Iterator[Encoded | Rejected]:
    """One result a row, in order, a batch in memory at a time."""
    encoder, rows = RowEncoder(tokenizer), iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield from encoder.encode(batch)


def _plan(config: TrainingConfig, selection: Selection, world_size: int, capacity: int) -> Plan:
    return make_plan(
        selection.kept,
        selection.lengths,
        selection.supervised,
        epochs=config.hyperparameters.epochs,
        batch=config.hyperparameters.effective_batch_size,
        world_size=world_size,
        capacity=capacity,
        seed=config.seed,
    )


def _summary(
    paths: JobPaths, tokens: TokenFile, selection: Selection, plan: Plan, validation: PreparedValidation | None
) -> Prepared:
    return Prepared(
        tokens=str(tokens.path),
        plan=str(paths.plan),
        steps=plan.steps,
        steps_per_epoch=int((plan.epoch == 1).sum()),
        rows=len(selection.kept),
        examples=len(plan.examples),
        token_count=int(plan.tokens.sum()),
        supervised_count=int(plan.supervised.sum()),
        micro_batches=len(plan.bin_offsets) - 1,
        truncated=selection.truncated,
        dropped=selection.dropped,
        rejected=tokens.rejected,
        validation=validation,
    )


def _nothing_left(what: str, tokens: TokenFile, selection: Selection, limit: int) -> str:
    reasons = [f"{rows.count} rejected: {reason}" for reason, rows in tokens.rejected.items()]
    if selection.dropped.count:
        reasons.append(f"{selection.dropped.count} have nothing to learn within {limit} tokens")
    return f"no row of the {what} can be trained on ({'; '.join(reasons) or 'it is empty'})"


def _tell(prepared: Prepared) -> None:
    print(
        f"{prepared.rows:,} rows, {prepared.steps:,} steps, {prepared.token_count:,} tokens, "
        f"{prepared.supervised_count:,} of them carry loss",
        flush=True,
    )
    _tell_left_out("rows", prepared)
    if validation := prepared.validation:
        print(
            f"validation: {validation.rows:,} rows, {validation.supervised_count:,} tokens that carry loss, "
            f"after the steps {', '.join(map(str, validation.points))}",
            flush=True,
        )
        _tell_left_out("validation rows", validation)


def _tell_left_out(what: str, of: Prepared | PreparedValidation) -> None:
    for reason, rows in {"truncated": of.truncated, "dropped": of.dropped, **of.rejected}.items():
        if rows.count:
            numbers = ", ".join(map(str, rows.first)) + (", …" if rows.count > len(rows.first) else "")
            print(f"{rows.count:,} {what} {reason}: {numbers}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfslurm.training.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, help="the job's folder")
    paths = JobPaths(parser.parse_args(argv).folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if has_succeeded(paths):
        print("an earlier attempt has succeeded: nothing is left to do", flush=True)
        return 0
    paths.outcome.unlink(missing_ok=True)
    return reporting(paths.outcome, lambda: _attempt(paths, os.environ), attempt=attempt_number(os.environ))


def _attempt(paths: JobPaths, environment: Mapping[str, str]) -> int:
    if limit := environment.get("TFSLURM_BARREN_ATTEMPTS"):
        require_fruit(paths.resume, attempt_number(environment), int(limit))
    prepare(paths, environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
