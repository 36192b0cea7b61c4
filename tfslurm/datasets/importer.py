"""`python -m tfslurm.datasets.importer FOLDER`: an import, as it runs in the background.

Reads `import.json` in FOLDER, copies and validates into the staging folder, tells `progress.json`
once a second and ends with `outcome.json`. It publishes nothing and knows no catalog.
"""

from __future__ import annotations

import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tfslurm.datasets.files import expand
from tfslurm.datasets.ingest import ingest
from tfslurm.errors import ConfigurationError, EndedBadly, TfslurmError, ValidationError
from tfslurm.faults import fault_point
from tfslurm.files import write_json
from tfslurm.paths import ImportPaths

INTERVAL = 1.0


class ImportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to import: `source` is an absolute path of a file or folder, or a glob."""

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
    """Import into the staging folder; the outcome of a success. Raises what `ingest` raises."""
    config = ImportConfig.read(paths.config)
    source = expand(config.source)
    done = ingest(
        source[0] if len(source) == 1 else source,
        Path(config.staging),
        format=config.format,
        field_map=config.field_map,
        progress=Reporter(paths),
    )
    fault_point("import-ingested")
    return {
        "result": "succeeded",
        "digest": done.manifest.digest,
        "size_bytes": done.manifest.size,
        "file_count": len(done.manifest.entries),
        "report": done.report.to_dict(),
    }


class Reporter:
    """Writes `progress.json` when a second has passed, and at the end; leaves where `stop` is there."""

    def __init__(self, paths: ImportPaths, interval: float = INTERVAL) -> None:
        self.paths, self.interval, self.next = paths, interval, 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self.next and done < total:
            return
        self.next = time.monotonic() + self.interval
        if self.paths.stop.exists():
            raise EndedBadly("The import was stopped.")
        write_json(self.paths.progress, {"bytes_done": done, "bytes_total": total, "at": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _failure(error: Exception) -> dict[str, Any]:
    report = error.report if isinstance(error, ValidationError) else None
    if isinstance(error, TfslurmError):
        return {"result": "failed", "error": str(error), "report": report}
    return {"result": "failed", "error": f"Unexpected: {type(error).__name__}: {error}", "report": report}


def main(arguments: list[str]) -> int:
    """The exit code of `errors`: 0, or that of what went wrong."""
    if len(arguments) != 1:
        print("usage: python -m tfslurm.datasets.importer FOLDER", file=sys.stderr)
        return 2
    paths = ImportPaths(Path(arguments[0]))
    try:
        outcome, code = run(paths), 0
    except TfslurmError as error:
        print(f"error: {error}", file=sys.stderr)
        outcome, code = _failure(error), error.exit_code
    except Exception as error:
        traceback.print_exc()
        outcome, code = _failure(error), 1
    write_json(paths.outcome, outcome)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
