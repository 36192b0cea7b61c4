import json

import pytest


@pytest.fixture
def write(tmp_path):
    """Write lines (rows, or bytes as they are) to a file of a new source folder; returns the folder."""

    def write(*lines, name="a.jsonl", end=b"\n"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + end for line in lines)
        )
        return tmp_path / "source"

    return write
