#!/usr/bin/env python3
"""What tfslurm adds to Slurm, on the dev cluster: submitting a sweep, following many jobs, listing while Slurm hangs.

    eval "$(scripts/devcluster up)"; scripts/bench/submission.py [--cells 1000] [--live 2000] [--runs 5]

Run it with the interpreter of an environment that has tfslurm. Three parts, each with its target:

- sweep: `tfslurm job sweep` of --cells cells, from the start of the process to its end, against a process that
  imports submitit and calls map_array with as many empty functions. Both in turns. At most 1.5 times as long.
- sync: `tfslurm sync` with --live pending jobs: at most four Slurm commands, and at most 0.5 s besides them.
- stale: `tfslurm job list` while squeue hangs: an answer within 2 s, which says that it is stale.

A job of the bench's own keeps the nodes busy, so that nothing starts. Prints medians in seconds as JSON; the exit
code is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfslurm import settings as configuration
from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog import db
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import BaseModel, database, now
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import seal
from tfslurm.installation import install

RATIO, COMMANDS, SHARE, STALE = 1.5, 4, 0.5, 2.0

SUBMITIT = """
import sys
import submitit
executor = submitit.SlurmExecutor(folder=sys.argv[2])
executor.update_parameters(time=10, mem="500M", cpus_per_task=1, array_parallelism=int(sys.argv[1]))
print(executor.map_array(abs, range(int(sys.argv[1])))[0].job_id.partition("_")[0])
"""

WRAPPER = """#!/bin/bash
start=$EPOCHREALTIME
{command} "$@"
code=$?
echo "{name} $start $EPOCHREALTIME" >>{log}
exit $code
"""

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'


class Site:
    """A storage root of its own, with a model and a dataset; nothing of it is ever trained."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("TFSLURM_")}
        self.environment["TFSLURM_CONFIG"] = str(folder / "site.yaml")
        site = {"root": str(folder / "root"), "training": {"instance": "one"}, "slurm": {"poll_floor": 0}}
        (folder / "site.yaml").write_text(json.dumps(site))
        one = {"purposes": ["training"], "memory": "500M", "time": 10}
        (folder / "instances.yaml").write_text(json.dumps({"instances": {"one": one}}))
        settings = configuration.load(folder / "site.yaml", environ={})
        install(settings)
        db.connect(settings)
        self._fill(settings)
        database.close()
        self.sweeps = 0

    def _fill(self, settings: configuration.Settings) -> None:
        with write_transaction():
            BaseModel.create(
                name="tiny", revision="r1", digest="sha256:1", location="/", source="/", metadata={},
                owner="bench", created_at=now(),
            )  # fmt: skip
        dataset = registry.create(settings, "chats", "conversational", {})
        (settings.root.assembling(dataset.artifact_id) / "a.jsonl").write_text(ROW)
        seal(settings, dataset)

    def run(self, *words: str, path: Path | None = None, check: bool = True) -> subprocess.CompletedProcess:
        environment = dict(self.environment)
        if path:
            environment["PATH"] = f"{path}:{environment['PATH']}"
        command = [sys.executable, "-m", "tfslurm", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)

    def sweep(self, cells: int) -> tuple[str, float]:
        """Its name, and the seconds that the command took."""
        self.sweeps += 1
        name, seeds = f"sweep-{self.sweeps}", ",".join(map(str, range(cells)))
        words = ["job", "sweep", "--model", "tiny", "--dataset", "chats", "--grid", f"seed={seeds}", "--name", name]
        start = time.perf_counter()
        self.run(*words)
        return name, time.perf_counter() - start


@contextmanager
def busy() -> Iterator[None]:
    """Keep the nodes to ourselves, so that what is submitted waits."""
    words = ["sbatch", "--parsable", "--nodes=3", "--exclusive", "--time=60", "--output=/dev/null"]
    job_id = subprocess.check_output([*words, "--wrap", "sleep 3600"], text=True).strip()
    try:
        deadline = time.monotonic() + 60
        while "R" not in subprocess.check_output(["squeue", "-h", "-o", "%t", "-j", job_id], text=True):
            if time.monotonic() > deadline:
                raise SystemExit("the dev cluster is not idle: nothing of the bench may start, so it needs its nodes")
            time.sleep(0.2)
        yield
    finally:
        subprocess.run(["scancel", job_id], check=True)


def submitit_seconds(count: int, folder: Path) -> float:
    folder.mkdir()
    start = time.perf_counter()
    command = [sys.executable, "-c", SUBMITIT, str(count), str(folder)]
    job_id = subprocess.check_output(command, text=True, cwd=folder).strip()
    seconds = time.perf_counter() - start
    subprocess.run(["scancel", job_id], check=True)
    shutil.rmtree(folder)
    return seconds


def sweeps(site: Site, count: int, runs: int) -> dict:
    """One run more than counted, to warm up; each pair is taken right after another, so both see the same machine."""
    ours, theirs = [], []
    for number in range(runs + 1):
        name, seconds = site.sweep(count)
        site.run("job", "stop", "--sweep", name)
        ours.append(seconds)
        theirs.append(submitit_seconds(count, site.folder / f"submitit-{number}"))
    ratio = statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))
    return {
        "cells": count,
        "tfslurm": round(statistics.median(ours[1:]), 3),
        "submitit": round(statistics.median(theirs[1:]), 3),
        "ratio": round(ratio, 2),
        "ratios": [round(a / b, 2) for a, b in zip(ours[1:], theirs[1:], strict=True)],
        "met": ratio <= RATIO,
    }


def wrappers(folder: Path, log: Path) -> Path:
    """Slurm's commands, each noting when it ran."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel"):
        script = folder / name
        script.write_text(WRAPPER.format(command=shutil.which(name), name=name, log=log))
        script.chmod(0o755)
    return folder


def syncs(site: Site, live: int, runs: int) -> dict:
    """With all jobs pending, as they were at the last sync: what a cron job does every minute."""
    names = [site.sweep(live // 2)[0] for _ in range(2)]
    log = site.folder / "commands"
    path = wrappers(site.folder / "timed", log)
    shares, walls, counts = [], [], []
    for _ in range(runs + 1):
        log.unlink(missing_ok=True)
        start = time.perf_counter()
        site.run("sync", path=path)
        walls.append(time.perf_counter() - start)
        lines = [line.split() for line in log.read_text().splitlines()]
        counts.append(len(lines))
        shares.append(walls[-1] - sum(float(end) - float(begin) for _, begin, end in lines))
    for name in names:
        site.run("job", "stop", "--sweep", name)
    share = statistics.median(shares[1:])
    return {
        "live": live,
        "commands": max(counts),
        "wall": round(statistics.median(walls[1:]), 3),
        "own_share": round(share, 3),
        "first": round(walls[0], 3),
        "met": max(counts) <= COMMANDS and share <= SHARE,
    }


def stale(site: Site, live: int) -> dict:
    name = site.sweep(live)[0]
    folder = site.folder / "hanging"
    folder.mkdir()
    for command in ("squeue", "sacct", "scontrol"):
        (folder / command).write_text("#!/bin/bash\nexec sleep 60\n")
        (folder / command).chmod(0o755)
    start = time.perf_counter()
    done = site.run("job", "list", "--limit", "50", path=folder)
    seconds = time.perf_counter() - start
    site.run("job", "stop", "--sweep", name)
    said = "does not answer" in done.stderr
    rows = len(done.stdout.splitlines()) - 1
    return {"live": live, "seconds": round(seconds, 3), "says_so": said, "rows": rows, "met": said and seconds <= STALE}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if not shutil.which("sbatch") or "SLURM_CONF" not in os.environ:
        raise SystemExit('no dev cluster: eval "$(scripts/devcluster up)"')
    folder = Path(tempfile.mkdtemp(prefix="tfslurm-bench-"))
    try:
        with busy():
            result = {
                "load": round(os.getloadavg()[0], 1),
                "sweep": sweeps(Site(folder / "a"), options.cells, options.runs),
                "sync": syncs(Site(folder / "b"), options.live, options.runs),
                "stale": stale(Site(folder / "c"), options.live),
            }
    finally:
        remove_tree(folder)
    print(json.dumps(result, indent=2))
    return int(not all(part["met"] for part in result.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
