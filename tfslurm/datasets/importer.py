"""`python -m tfslurm.datasets.importer FOLDER`: an import, as it runs in the background.

Reads `import.json` in FOLDER, downloads what is remote into the spool, copies and validates into the
staging folder, tells `progress.json` once a second and ends with `outcome.json`. Killed and started
again, it goes on where it was. It publishes nothing and knows no catalog.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tfslurm.artifacts.publish import remove_tree
from tfslurm.datasets.download import Download
from tfslurm.datasets.files import Found, expand
from tfslurm.datasets.ingest import ingest
from tfslurm.datasets.sources import STDIN, Source
from tfslurm.datasets.stores import open_store
from tfslurm.datasets.validation import Validator, refuse
from tfslurm.errors import ConfigurationError, EndedBadly, TfslurmError, ValidationError
from tfslurm.faults import fault_point
from tfslurm.files import locked, read_json, write_json
from tfslurm.paths import ImportPaths

INTERVAL = 1.0
DOWNLOADED = "downloaded"
"""The word by which the importer tells itself that only the spool is left to ingest."""


class ImportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to import: `source` is an absolute path of a file or folder, a glob, a URL, or - for what was spooled."""

    dataset_id: str
    source: str
    format: str
    field_map: dict[str, str] = {}
    staging: str

    @classmethod
    def read(cls, path: Path) -> ImportConfig:
        """Raises ConfigurationError where the file is missing or not one of ours."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigurationError(f"{path}: {error}") from error


def run(paths: ImportPaths) -> dict[str, Any]:
    """Import into the staging folder; the outcome of a success. Raises what `ingest` and `Download.run` raise."""
    config = ImportConfig.read(paths.config)
    return _ingested(paths, config, fetch(paths, config))


def _ingested(paths: ImportPaths, config: ImportConfig, found: Path | Sequence[Path]) -> dict[str, Any]:
    done = ingest(
        found,
        Path(config.staging),
        format=config.format,
        field_map=config.field_map,
        progress=Reporter(paths, "ingest"),
    )
    fault_point("import-ingested")
    return {
        "result": "succeeded",
        "digest": done.manifest.digest,
        "size_bytes": done.manifest.size,
        "file_count": len(done.manifest.entries),
        "report": done.report.to_dict(),
    }


def fetch(paths: ImportPaths, config: ImportConfig) -> Path | Sequence[Path]:
    """What `ingest` reads: the paths themselves, or the spool, with all that is remote downloaded."""
    if config.source == STDIN:
        return paths.objects
    source = source_of(paths, config)
    if not source.remote:
        found = expand(source.given)
        return found[0] if len(found) == 1 else found

    def judge(found: Found) -> None:
        _refuse_names(config, paths, found)

    store = open_store(source)
    fetched = Download(store, source, paths, Reporter(paths, "download"), judge=judge).run()
    print(f"fetched {fetched:,} bytes from {source.shown}", flush=True)
    return paths.objects


def source_of(paths: ImportPaths, config: ImportConfig) -> Source:
    """The source as it was given: from its own file where it holds a secret."""
    try:
        return Source.parse(paths.source.read_text())
    except FileNotFoundError:
        return Source.parse(config.source)


def _refuse_names(config: ImportConfig, paths: ImportPaths, found: Found) -> None:
    """Raises ValidationError, before anything is downloaded, as `ingest` would for a folder with these names."""
    found = replace(found, problems=[replace(p, message=_named(p.message, paths)) for p in found.problems])
    validator = Validator(config.format, config.field_map)
    validator.note_files(found)
    if found.problems or not found.files:
        refuse(validator.report(), config.source)


def _named(text: str, paths: ImportPaths, source: str = "") -> str:
    """`text` with what lies in the spool under the names that it has at its source."""
    if source == STDIN:
        source = "standard input"
    return text.replace(f"{paths.objects}/", "").replace(str(paths.objects), source)


class Reporter:
    """Writes `progress.json` when a second has passed, and at the end; leaves where `stop` is there."""

    def __init__(self, paths: ImportPaths, phase: str = "ingest", interval: float = INTERVAL) -> None:
        self.paths, self.phase, self.interval, self.next = paths, phase, interval, 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self.next and done < total:
            return
        self.next = time.monotonic() + self.interval
        if self.paths.stop.exists():
            raise EndedBadly("The import was stopped.")
        told = {"phase": self.phase, "bytes_done": done, "bytes_total": total, "at": _now()}
        write_json(self.paths.progress, told)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _failure(paths: ImportPaths, error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, TfslurmError) else f"Unexpected: {type(error).__name__}: {error}"
    report = error.report if isinstance(error, ValidationError) else None
    return {"result": "failed", "error": _presentable(paths, text), "report": report}


def _presentable(paths: ImportPaths, text: str) -> str:
    """Without secrets, and with the source's own name for the spool."""
    try:
        source = source_of(paths, ImportConfig.read(paths.config))
    except TfslurmError:
        return text
    return _named(source.scrub(text), paths, source.shown)


def _attempt(paths: ImportPaths, downloaded: bool, program: bool) -> tuple[dict[str, Any], int]:
    """The outcome, and the exit code."""
    try:
        config = ImportConfig.read(paths.config)
        found = paths.objects if downloaded else fetch(paths, config)
        if program and threading.active_count() > 1:
            _start_afresh(paths)
        return _ingested(paths, config, found), 0
    except TfslurmError as error:
        outcome, code = _failure(paths, error), error.exit_code
        print(f"error: {outcome['error']}", file=sys.stderr)
    except Exception as error:
        outcome, code = _failure(paths, error), 1
        print(_presentable(paths, traceback.format_exc()), file=sys.stderr)
    return outcome, code


def _start_afresh(paths: ImportPaths) -> None:
    """Become a new program, in the same process, that goes on with what is downloaded.

    The libraries of buckets and hubs leave threads behind, and `ingest` forks: a fork beside threads may hang.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tfslurm.datasets.importer", str(paths.folder), DOWNLOADED])


def main(arguments: list[str], *, program: bool = False) -> int:
    """The exit code of `errors`: 0, or that of what went wrong; a `program` of its own may become a new one."""
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], [DOWNLOADED]):
        print("usage: python -m tfslurm.datasets.importer FOLDER", file=sys.stderr)
        return 2
    paths = ImportPaths(Path(arguments[0]))
    with locked(paths.lock):
        if ended := read_json(paths.outcome):
            # A process of an earlier attempt, whose script was killed, has come to the end meanwhile.
            return 0 if ended["result"] == "succeeded" else 1
        outcome, code = _attempt(paths, arguments[1:] == [DOWNLOADED], program)
        write_json(paths.outcome, outcome)
        fault_point("import-outcome")
        clean_up(paths)
    return code


def clean_up(paths: ImportPaths) -> None:
    """Remove what only an import that goes on needs: the spool, and the source's secret."""
    remove_tree(paths.spool)
    paths.source.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program=True))
