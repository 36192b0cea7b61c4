"""Lines that are meant to do harm: refused by name, quickly, in little memory, and the lines after them count."""

import gzip
import json
import subprocess
import sys
import time

import pytest

GOOD = b'{"text": "Once upon a time."}\n'

PROGRAM = """if True:
    import json, resource, sys
    from pathlib import Path
    from tfslurm.datasets.validation import validate
    resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY))
    report = validate(Path(sys.argv[1]), "text", workers=int(sys.argv[2]))
    # Not its own ru_maxrss: exec leaves there what the process that started it took.
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    errors = [[error.line, error.check] for error in report.first_errors]
    print(json.dumps({"rows": report.rows, "errors": errors, "peak": peak >> 10}))
"""


def checked(path, workers=1):
    """What validation found in a process of its own: rows, the first errors, MiB at its peak, and seconds."""
    started = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, str(path), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"seconds": time.monotonic() - started}


def bomb(path, line, packed=False):
    with gzip.open(path, "wb", compresslevel=1) if packed else open(path, "wb") as file:
        file.write(GOOD)
        for block in line:
            file.write(block)
        file.write(b"\n" + GOOD)


def long_line(megabytes):
    yield b'{"text": "'
    yield from (b"a" * 2**20 for _ in range(megabytes))
    yield b'"}'


@pytest.mark.parametrize(("name", "workers"), [("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl.gz", 1)])
def test_a_line_of_100_mb_is_refused_in_little_memory(tmp_path, name, workers):
    path = tmp_path / name
    bomb(path, long_line(100), packed=name.endswith(".gz"))
    found = checked(path, workers)
    assert (found["rows"], found["errors"]) == (3, [[2, "line_too_long"]])
    assert found["peak"] < 120, f"{found['peak']} MiB"
    assert found["seconds"] < 30


NESTED = {
    "lists": [b'{"text": "a", "m": ', b"[" * 3_000_000, b"]" * 3_000_000, b"}"],
    "objects": [b'{"text": "a", "m": ', b'{"k":' * 1_000_000, b"1", b"}" * 1_000_000, b"}"],
    "never closed": [b"[" * 7_000_000],
    "in the text's place": [b'{"text": ', b"[" * 3_000_000, b"]" * 3_000_000, b"}"],
}


@pytest.mark.parametrize("shape", NESTED)
def test_a_line_that_nests_millions_deep_is_refused_and_harms_nothing(tmp_path, shape):
    path = tmp_path / "a.jsonl"
    bomb(path, NESTED[shape])
    found = checked(path)
    assert (found["rows"], found["errors"]) == (3, [[2, "nested_too_deep"]])
    assert found["peak"] < 120, f"{found['peak']} MiB"
    assert found["seconds"] < 30
