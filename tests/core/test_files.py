import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tfslurm import files
from tfslurm.files import locked, read_json, sync_filesystem, tail, write_atomic, write_json


def test_a_file_is_replaced_with_its_mode(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": "ä"}, mode=0o600)
    write_atomic(path, "new\n", mode=0o444)
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_writer_that_is_killed_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    script = f"""
import os, signal
from pathlib import Path
from tfslurm import files
files.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(Path({str(path)!r}), "new")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_readers_never_see_a_part(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, ["x" * 10])
    script = f"""
from pathlib import Path
from tfslurm.files import write_json
for n in range(200):
    write_json(Path({str(path)!r}), [chr(97 + n % 26) * 100_000])
"""
    writer = subprocess.Popen([sys.executable, "-c", script])
    reads = 0
    while writer.poll() is None:
        assert len(set(read_json(path)[0])) == 1
        reads += 1
    assert writer.returncode == 0
    assert reads > 10


def test_a_missing_file_reads_as_none_and_a_damaged_one_is_an_error(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "bad.json")


def test_the_tail_of_a_log_is_read_from_its_end(tmp_path):
    log = tmp_path / "log"
    assert tail(log) == []
    log.write_bytes(b"".join(b"line %d \xff\n" % n for n in range(10_000)))
    assert tail(log, 2) == ["line 9998 �", "line 9999 �"]
    assert len(tail(log, 10_000, limit=1000)) < 100


HOLD = """
import sys, time
from pathlib import Path
from tfslurm.files import locked
counter = Path(sys.argv[1])
for _ in range(50):
    with locked(counter.with_suffix(".lock")):
        number = int(counter.read_text())
        time.sleep(0.0005)
        counter.write_text(str(number + 1))
"""


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    both = [subprocess.Popen([sys.executable, "-c", HOLD, counter]) for _ in range(3)]
    assert [process.wait() for process in both] == [0, 0, 0]
    assert counter.read_text() == "150"
    assert os.listdir(tmp_path) == ["counter"]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    lock = tmp_path / "lock"
    script = f"import time; from pathlib import Path; from tfslurm.files import locked\n" \
        f"with locked(Path({str(lock)!r})): print('held', flush=True); time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with locked(lock):
        assert time.monotonic() - start < 5
    assert not lock.exists()


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "lock"):
        raise RuntimeError
    with locked(tmp_path / "lock"):
        pass


def test_a_filesystem_is_brought_to_disk_as_a_whole(tmp_path):
    (tmp_path / "a").write_text("x")
    sync_filesystem(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_filesystem(tmp_path / "missing")
