#!/usr/bin/env python3
"""How long `tfslurm dataset list` takes, against the imports that it cannot do without.

    scripts/bench/cold_start.py [--datasets 1000] [--runs 30]

Run it with the interpreter of an environment that has tfslurm. It fills a catalog of its own with datasets,
then runs `python -m tfslurm dataset list` and `python -c "import click, peewee"` in turns, so that both see
the same machine, and prints the medians in seconds and their ratio as JSON. The exit code is 1 where the
ratio is above the target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tfslurm import settings as configuration
from tfslurm.catalog.db import write_transaction
from tfslurm.datasets import registry
from tfslurm.installation import install

TARGET = 2.0


def fill(root: Path, count: int) -> None:
    """A catalog with `count` datasets that are being assembled."""
    settings = configuration.load(root=root, environ={})
    install(settings)
    with write_transaction():
        for number in range(count):
            folder = root / "assembling" / f"bench-{number}"
            registry.insert(f"ds-{number:016}", f"bench-{number:05}", "text", {}, folder, None)


def seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(root: Path, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run of the listing, and of the bare imports; one warm-up of each is left out."""
    environment = {**os.environ, "TFSLURM_ROOT": str(root)}
    listing = [sys.executable, "-m", "tfslurm", "dataset", "list"]
    imports = [sys.executable, "-c", "import click, peewee"]
    times = [(seconds(listing, environment), seconds(imports, environment)) for _ in range(runs + 1)][1:]
    return [a for a, _ in times], [b for _, b in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.datasets)
        listing, imports = measure(Path(folder), options.runs)
    ratio = statistics.median(listing) / statistics.median(imports)
    result = {
        "datasets": options.datasets,
        "runs": options.runs,
        "dataset_list_median": round(statistics.median(listing), 4),
        "imports_median": round(statistics.median(imports), 4),
        "ratio": round(ratio, 2),
        "target": TARGET,
    }
    print(json.dumps(result, indent=2))
    return int(ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
