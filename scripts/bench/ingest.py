#!/usr/bin/env python3
"""Import and verify, beside what copies or reads the same bytes, in one run.

Prints JSON: seconds and processor seconds (medians of --runs, each a fresh process), ratios and peak
memory. The data are chats made from --seed; with --shape columns, rows have columns of no use too,
with --shape tools they have tools, a call of one, its result and a weight. cp and openssl always run;
`datasets.load_dataset("json")` with --hf-python PYTHON, `dvc add` with --dvc PROGRAM. An import copies,
hashes, validates, fsyncs and publishes; none of the others does all of that.

    PYTHONPATH=. python scripts/bench/ingest.py --scratch /tmp/x [--mb 600] [--sizes 60,6000] [--shape tools]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

IMPORT = """
import sys
from pathlib import Path
from tfslurm.artifacts.publish import publish
from tfslurm.datasets.ingest import ingest
source, home = map(Path, sys.argv[1:])
ingest(source, home / "staging", format="conversational")
print(publish(home / "staging", home / "final").digest)
"""
VERIFY = """
import sys
from pathlib import Path
from tfslurm.artifacts import manifest
folder = Path(sys.argv[1])
manifest.verify_folder(folder, manifest.read(folder).digest)
"""
HF = """
import sys, datasets
print(len(datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2], num_proc=2)))
"""
SYLLABLES = "ta re mo li su ne ka the in an or er ou st on al en ti".split()
ODD = ["“so”", "naïve", "→", "日本", "it's", 'f("x")', "a\\b"]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place now.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]


def write_chats(path: Path, size: int, seed: int, shape: str) -> int:
    """About `size` bytes of chats of 1 to 3 turns, 1.4 KB each on average and more by `shape`; returns the rows."""
    draw, done, rows = random.Random(seed), 0, 0
    chats = [_chat(draw) for _ in range(8000)]
    with open(path, "w") as file:
        while done < size:
            rows += 1
            first, *rest = draw.choice(chats)
            messages = [{**first, "content": f"{first['content']} {rows}"}, *rest]
            row = SHAPES[shape](rows, messages)
            done += file.write(json.dumps(row, ensure_ascii=rows % 2 == 0) + "\n")
    return rows


def _plain(number: int, messages: list[dict]) -> dict:
    return {"messages": messages}


def _with_columns(number: int, messages: list[dict]) -> dict:
    metadata = {"source": "made", "language": "en", "score": number / 7}
    return {"id": f"row-{number}", "messages": messages, "metadata": metadata}


def _with_tools(number: int, messages: list[dict]) -> dict:
    call = {"id": f"call_{number}", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"place": "Oslo"}'}
    called = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4 °C, rain", "tool_call_id": call["id"]},
    ]
    return {"messages": [*messages[:-1], *called, {**messages[-1], "weight": 1}], "tools": TOOLS}


SHAPES = {"plain": _plain, "columns": _with_columns, "tools": _with_tools}


def _chat(draw: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": _text(draw, 12)}] if draw.random() < 0.3 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        messages += [{"role": "user", "content": _text(draw, 25)}, {"role": "assistant", "content": _text(draw, 90)}]
    return messages


def _text(draw: random.Random, mean: int) -> str:
    count = max(1, int(draw.lognormvariate(0, 0.7) * mean))
    words = ["".join(draw.choices(SYLLABLES, k=draw.choice((1, 2, 2, 3)))) for _ in range(count)]
    for index in range(draw.randrange(12), count, 12):
        words[index] += draw.choice((".\n", ",", "\n\n-", ".", ";"))
    if draw.random() < 0.15:  # most English chats are ASCII
        words[draw.randrange(count)] = draw.choice(ODD)
    return " ".join(words)


class Tool(NamedTuple):
    """A command, what comes before it untimed, and its subprocess options."""

    command: list[str]
    prepare: Callable[[], object] = lambda: None
    options: dict = {}


class Cost(NamedTuple):
    """Seconds on the clock, and of the processors by it and its children: on a busy machine they tell more."""

    seconds: float
    cpu: float


def measure_in_turn(tools: dict[str, Tool], runs: int) -> dict[str, Cost]:
    """The medians. All tools take turns, after a round that isn't counted: memory and disk are the same for all."""
    costs: dict[str, list[Cost]] = {name: [] for name in tools}
    for _ in range(runs + 1):
        for name, tool in tools.items():
            tool.prepare()
            costs[name].append(_cost(tool))
    return {name: Cost(*map(statistics.median, zip(*each[1:], strict=True))) for name, each in costs.items()}


def _cost(tool: Tool) -> Cost:
    before, started = os.times(), time.perf_counter()
    subprocess.run(tool.command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **tool.options)
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(seconds, cpu)


def fresh(folder: Path) -> Path:
    """An empty folder, whatever read-only things were in it."""
    if folder.exists():
        for root, folders, _ in os.walk(folder):
            for name in folders:
                os.chmod(os.path.join(root, name), 0o700)
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def import_command(data: Path, home: Path) -> list[str]:
    return [sys.executable, "-c", IMPORT, str(data), str(home)]


def peak_memory(command: list[str]) -> int:
    """The most megabytes (PSS: shared pages are counted once) that a command and its children had at once."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True), 0
    while process.poll() is None:
        peak = max(peak, sum(_pss(pid) for pid in os.listdir("/proc") if pid.isdigit() and _group(pid) == process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return peak // 1024


def _group(pid: str) -> int:
    try:
        return os.getpgid(int(pid))
    except ProcessLookupError:
        return -1


def _pss(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def compare(data: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Cost]:
    """The cost of every tool on the same file."""
    home, copy = scratch / "home", scratch / "copy.jsonl"
    tools = {
        "import": Tool(import_command(data, home), lambda: fresh(home)),
        "cp": Tool(["cp", "--reflink=never", str(data), str(copy)], lambda: copy.unlink(missing_ok=True)),
        "openssl": Tool(["openssl", "dgst", "-sha256", str(copy)]),
    }
    if options.hf_python:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
        command = [options.hf_python, "-c", HF, str(data), str(home)]
        tools["datasets"] = Tool(command, lambda: fresh(home), {"env": environment})
    if options.dvc:
        command = [options.dvc, "add", "-q", "a.jsonl"]
        tools["dvc"] = Tool(command, lambda: _dvc_folder(fresh(home), data, options), {"cwd": home})
    costs = measure_in_turn(tools, options.runs)
    copy.unlink()
    return costs


def _dvc_folder(home: Path, data: Path, options: argparse.Namespace) -> None:
    shutil.copyfile(data, home / "a.jsonl")
    os.sync()
    for command in (["git", "init", "-q"], [options.dvc, "init", "-q"]):
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)
    site = ["config", "core.site_cache_dir", str(home / "site")]
    subprocess.run([options.dvc, *site], cwd=home, check=True)


def verify(data: Path, scratch: Path, runs: int) -> dict[str, Cost]:
    """`verify` of one file for each core, and as many openssl at once on the same files."""
    source, home, cores = fresh(scratch / "source"), fresh(scratch / "home"), len(os.sched_getaffinity(0))
    for number in range(cores):
        shutil.copyfile(data, source / f"{number}.jsonl")
    subprocess.run(import_command(source, home), check=True, stdout=subprocess.DEVNULL)
    fresh(source)
    files = " ".join(f"'{home}/final/{number}.jsonl'" for number in range(cores))
    both = f"for f in {files}; do openssl dgst -sha256 $f & done; wait".replace("$f", '"$f"')
    tools = {
        "verify": Tool([sys.executable, "-c", VERIFY, str(home / "final")]),
        "openssl_each_core": Tool(["sh", "-c", both]),
    }
    return measure_in_turn(tools, runs)


def growth(mb: int, scratch: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of an import of `mb` megabytes."""
    data, home = scratch / f"{mb}.jsonl", scratch / "home"
    write_chats(data, mb * 1_000_000, options.seed, options.shape)
    tools = {"import": Tool(import_command(data, home), lambda: fresh(home))}
    cost = measure_in_turn(tools, options.runs if mb <= 1000 else 1)["import"]
    result = {
        "seconds": cost.seconds,
        "cpu": cost.cpu,
        "bytes": data.stat().st_size,
        "peak_mb": peak_memory(import_command(data, fresh(home))),
    }
    data.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="an existing folder on a disk, not tmpfs")
    parser.add_argument("--mb", type=int, default=600)
    parser.add_argument("--sizes", default="", help="megabytes of more imports, comma-separated: is time linear?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="plain")
    parser.add_argument("--hf-python", help="a Python that has datasets")
    parser.add_argument("--dvc", help="the program dvc")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="ingest-", dir=options.scratch))
    try:
        print(json.dumps(measure(scratch, options), indent=2))
    finally:
        fresh(scratch).rmdir()


def measure(scratch: Path, options: argparse.Namespace) -> dict:
    data = scratch / "chats.jsonl"
    rows, load = write_chats(data, options.mb * 1_000_000, options.seed, options.shape), os.getloadavg()[0]
    data.read_bytes()
    costs = compare(data, scratch, options) | verify(data, scratch, options.runs)
    seconds = {name: cost.seconds for name, cost in costs.items()}
    peak = peak_memory(import_command(data, fresh(scratch / "home")))
    size = data.stat().st_size
    data.unlink()
    sizes = {mb: growth(mb, scratch, options) for mb in map(int, filter(None, options.sizes.split(",")))}
    ratios = {f"import / {name}": seconds["import"] / seconds[name] for name in ("datasets", "dvc") if name in seconds}
    ratios["import / (cp + openssl)"] = seconds["import"] / (seconds["cp"] + seconds["openssl"])
    ratios["verify speed / openssl"] = seconds["openssl_each_core"] / seconds["verify"]
    for mb, grown in sizes.items():
        per_byte = (grown["seconds"] / grown["bytes"]) / (seconds["import"] / size)
        ratios[f"seconds a byte, {mb} MB / {options.mb} MB"] = per_byte
    return {
        "bytes": size,
        "rows": rows,
        "seconds": seconds,
        "cpu": {name: cost.cpu for name, cost in costs.items()},
        "ratios": ratios,
        "peak_mb": peak,
        "sizes": sizes,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
