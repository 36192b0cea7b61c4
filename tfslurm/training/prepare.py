"""A job's first step on the node: tokenize the dataset, unless that was done, and plan the run.

`python -m tfslurm.training.prepare JOBFOLDER`, one process, never under the distributed launcher.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tfslurm.artifacts.identity import verify_quick
from tfslurm.artifacts.references import DatasetRef
from tfslurm.datasets.formats import Row, read_rows
from tfslurm.errors import InvalidError
from tfslurm.paths import JobPaths
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.config import TrainingConfig
from tfslurm.training.masks import Encoded, Rejected, RowEncoder
from tfslurm.training.outcome import reporting
from tfslurm.training.plan import Plan, make_plan
from tfslurm.training.prepared import Prepared
from tfslurm.training.selection import Selection, select
from tfslurm.training.tokens import Source, TokenFile, write_tokens

BATCH = 512
"""Rows that are tokenized together: enough for the tokenizer's threads, and bounded in memory."""


def prepare(paths: JobPaths) -> Prepared:
    """Verify the dataset, tokenize it, plan the run; writes plan.npz and then prepared.json.

    Raises InvalidError where the bytes are not those that were sealed, or no row can be trained on.
    """
    config = TrainingConfig.read(paths.config)
    _verify(config)
    tokens = tokenize(config.dataset, Path(config.base_model.path), Path(config.tokens))
    limit = config.hyperparameters.max_seq_length
    selection = select(tokens, limit, config.trainer.overlong)
    if len(selection.kept) == 0:
        hint = "check the dataset's format and field map, or raise max_seq_length"
        raise InvalidError(_nothing_left(tokens, selection, limit), hint=hint)
    plan = _plan(config, selection)
    plan.save(paths.plan)
    prepared = _summary(paths, tokens, selection, plan)
    prepared.write(paths.prepared)
    _tell(prepared)
    return prepared


def _verify(config: TrainingConfig) -> None:
    """Its bytes are read where its files are not those of the last full verification, or that is too long ago."""
    dataset = config.dataset
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


def _plan(config: TrainingConfig, selection: Selection) -> Plan:
    return make_plan(
        selection.kept,
        selection.lengths,
        selection.supervised,
        epochs=config.hyperparameters.epochs,
        batch=config.hyperparameters.effective_batch_size,
        world_size=config.processes.world_size,
        capacity=config.trainer.micro_batch_tokens,
        seed=config.seed,
    )


def _summary(paths: JobPaths, tokens: TokenFile, selection: Selection, plan: Plan) -> Prepared:
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
    )


def _nothing_left(tokens: TokenFile, selection: Selection, limit: int) -> str:
    reasons = [f"{rows.count} rejected: {reason}" for reason, rows in tokens.rejected.items()]
    if selection.dropped.count:
        reasons.append(f"{selection.dropped.count} have nothing to learn within {limit} tokens")
    return f"no row of the dataset can be trained on ({'; '.join(reasons) or 'it is empty'})"


def _tell(prepared: Prepared) -> None:
    print(
        f"{prepared.rows:,} rows, {prepared.steps:,} steps, {prepared.token_count:,} tokens, "
        f"{prepared.supervised_count:,} of them carry loss",
        flush=True,
    )
    left_out = {"truncated": prepared.truncated, "dropped": prepared.dropped, **prepared.rejected}
    for reason, rows in left_out.items():
        if rows.count:
            numbers = ", ".join(map(str, rows.first)) + (", …" if rows.count > len(rows.first) else "")
            print(f"{rows.count:,} rows {reason}: {numbers}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfslurm.training.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, help="the job's folder")
    paths = JobPaths(parser.parse_args(argv).folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    paths.outcome.unlink(missing_ok=True)
    return reporting(paths.outcome, lambda: prepare(paths))


if __name__ == "__main__":
    sys.exit(main())
