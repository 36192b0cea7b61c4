#!/usr/bin/env python3
"""How long a page of `tfslurm dataset list` takes with many datasets, against the same with few.

    scripts/bench/listing.py [--many 100000] [--few 100] [--runs 20]

Run it with the interpreter of an environment that has tfslurm. Both catalogs are listed in turns, so that both
see the same machine; prints the medians in seconds and their ratio as JSON. The exit code is 1 where a ratio is
above the target.
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
from tfslurm.catalog.models import Artifact, Dataset, now
from tfslurm.identity import new_id
from tfslurm.installation import install

TARGET = 1.3

PAGES = {
    "ready": ["--status", "ready", "--limit", "50"],
    "format": ["--format", "text", "--limit", "50"],
    "owner": ["--owner", "somebody", "--limit", "50"],
    "error": ["--status", "error", "--limit", "50"],
}


def fill(root: Path, count: int) -> None:
    """A catalog with `count` datasets: most ready, a hundredth in error, of every format."""
    install(configuration.load(root=root, environ={}))
    formats = ("text", "instruction", "conversational", "pretokenized")
    artifacts, datasets = [], []
    for number in range(count):
        status = "error" if number % 100 == 0 else "ready"
        row = {"id": new_id("dataset"), "kind": "dataset", "name": f"bench-{number}", "status": status, "location": "-"}
        artifacts.append(row | {"owner": "somebody" if number % 2 else "another", "created_at": now()})
        datasets.append({"artifact": row["id"], "format": formats[number % 4], "field_map": {}, "metadata": {}})
    with write_transaction():
        for table, rows in ((Artifact, artifacts), (Dataset, datasets)):
            for start in range(0, count, 1000):
                table.insert_many(rows[start : start + 1000]).execute()


def seconds(root: Path, page: list[str]) -> float:
    command = [sys.executable, "-m", "tfslurm", "--root", str(root), "dataset", "list", *page]
    start = time.perf_counter()
    subprocess.run(command, env=os.environ, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    result, above = {}, False
    with tempfile.TemporaryDirectory() as many, tempfile.TemporaryDirectory() as few:
        fill(Path(many), options.many)
        fill(Path(few), options.few)
        for name, page in PAGES.items():
            times = [(seconds(Path(many), page), seconds(Path(few), page)) for _ in range(options.runs + 1)][1:]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            ratio = medians[0] / medians[1]
            above |= ratio > TARGET
            result[name] = {"many": round(medians[0], 4), "few": round(medians[1], 4), "ratio": round(ratio, 2)}
    print(json.dumps({**vars(options), "target": TARGET, **result}, indent=2))
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
