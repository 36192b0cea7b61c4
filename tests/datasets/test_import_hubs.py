"""hf:// and gs:// through the real huggingface_hub and gcsfs, against small servers that speak their protocols.

The Hub and Google's storage themselves are NOT reached by these tests.
"""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from web_server import text_rows

from tfslurm.datasets.importer import ImportConfig
from tfslurm.paths import ImportPaths

DATA = text_rows(300_000)
SHA = "a" * 40
FILES = {"data/train.jsonl": DATA, "data/test.jsonl": b'{"text": "x"}\n', "README.md": b"# hi"}
MODULES = {"gs": "gcsfs", "hf": "huggingface_hub"}


class _Handler(BaseHTTPRequestHandler):
    requests: list[tuple[str, str]] = []

    def do_GET(self):
        self.requests.append((self.path, self.headers["Authorization"] or ""))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        for start, answer in self.routes:
            if path.startswith(start):
                return answer(self, path.removeprefix(start), query)
        return self.answer({"error": {"code": 404, "message": "not found"}}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
        self.answer([self.entry(path) for path in wanted if path in FILES or path == "data"])

    def answer(self, value, status=200):
        self.data(json.dumps(value).encode(), status, "application/json")

    def data(self, data, status=200, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def ranged(self, data):
        span = self.headers["Range"] or self.headers["range"]
        if not span:
            return self.data(data)
        start, _, end = span.removeprefix("bytes=").partition("-")
        return self.data(data[int(start) : int(end) + 1 if end else None], 206)

    def entry(self, path):
        if path == "data":
            return {"type": "directory", "path": "data", "oid": "d" * 40, "size": 0}
        return {"type": "file", "path": path, "oid": f"{hash(FILES[path]) & 0xFFFF:040x}", "size": len(FILES[path])}

    def log_message(self, *_):
        pass


class Hub(_Handler):
    """What the Hugging Face Hub answers of one dataset. https://huggingface.co/docs/hub/api"""

    def info(self, rest, query):
        if "/tree/" in rest:
            below = rest.partition("/tree/")[2].partition("/")[2]
            deep = query.get("recursive") in (["True"], ["true"])
            paths = [path for path in [*FILES, "data"] if path.startswith(f"{below}/" if below else "")]
            return self.answer([self.entry(p) for p in paths if deep or "/" not in p.removeprefix(f"{below}/")])
        if rest.partition("/")[0] not in ("n", "n?"):
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": "o/n", "sha": SHA, "siblings": [], "private": False, "tags": [], "downloads": 0})

    def resolve(self, rest, query):
        return self.ranged(FILES[rest.partition("/")[2]])

    routes = [("/api/datasets/o/", info), ("/datasets/o/n/resolve/", resolve)]


class Bucket(_Handler):
    """What Google Cloud Storage's JSON API answers of one bucket. https://cloud.google.com/storage/docs/json_api"""

    def item(self, name):
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(FILES[name])),
            "generation": "7",
        }

    def list(self, rest, query):
        if rest.startswith("/"):
            if rest[1:] not in FILES:
                return self.answer({"error": {"code": 404, "message": "No such object"}}, 404)
            return self.ranged(FILES[rest[1:]]) if query.get("alt") == ["media"] else self.answer(self.item(rest[1:]))
        prefix = query.get("prefix", [""])[0]
        found, prefixes = [], set()
        for name in FILES:
            if name.startswith(prefix):
                below = name.removeprefix(prefix)
                if query.get("delimiter") == ["/"] and "/" in below:
                    prefixes.add(f"{prefix}{below.partition('/')[0]}/")
                else:
                    found.append(self.item(name))
        return self.answer({"kind": "storage#objects", "items": found, "prefixes": sorted(prefixes)})

    routes = [("/storage/v1/b/bucket/o", list), ("/download/storage/v1/b/bucket/o", list)]


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(handler):
        handler.requests = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def importer(tmp_path):
    def importer(source, **environment):
        module = MODULES[source.partition("://")[0]]
        pytest.importorskip(module, reason=f"{source} is NOT tested: {module} is missing, install its extra")
        paths = ImportPaths(tmp_path / "imports")
        paths.folder.mkdir()
        staging = str(tmp_path / "staging")
        order = ImportConfig(dataset_id="d", source=source, format="text", field_map={}, staging=staging)
        paths.config.write_text(json.dumps({name: getattr(order, name) for name in order.__struct_fields__}))
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)} | environment
        command = [sys.executable, "-m", "tfslurm.datasets.importer", str(paths.folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
        return done, json.loads(paths.outcome.read_text())

    return importer


@pytest.mark.parametrize(
    ("path", "files"), [("data", 2), ("data/t*.jsonl", 2), ("data/train.jsonl", 1), ("**/test.jsonl", 1)]
)
def test_files_of_a_dataset_on_the_hub_are_copied_with_the_users_token(importer, serve, tmp_path, path, files):
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("hf_" + "x" * 34)
    done, outcome = importer(f"hf://datasets/o/n/{path}", HF_ENDPOINT=serve(Hub))
    assert (done.returncode, outcome.get("file_count")) == (0, files), (done.stderr, Hub.requests)
    assert {who for path, who in Hub.requests if "/datasets/" in path} == {"Bearer hf_" + "x" * 34}
    assert "hf_x" not in done.stdout + done.stderr + json.dumps(outcome)
    if files == 1 and "train" in path:
        assert (tmp_path / "staging/train.jsonl").read_bytes() == DATA


def test_a_whole_dataset_on_the_hub_is_refused_by_the_names_that_are_no_data(importer, serve):
    done, outcome = importer("hf://datasets/o/n", HF_ENDPOINT=serve(Hub))
    assert (done.returncode, outcome["report"]["errors"]) == (5, {"unsupported_file": 1})
    assert "README.md" in outcome["error"]


def test_a_dataset_that_is_not_on_the_hub_is_named(importer, serve):
    done, outcome = importer("hf://datasets/o/other/a.jsonl", HF_ENDPOINT=serve(Hub))
    assert done.returncode == 5, done.stderr
    assert "hf://datasets/o/other/a.jsonl" in outcome["error"]


@pytest.mark.parametrize(("path", "files"), [("data", 2), ("data/t*.jsonl", 2), ("data/train.jsonl", 1)])
def test_objects_of_a_google_bucket_are_copied(importer, serve, tmp_path, path, files):
    done, outcome = importer(f"gs://bucket/{path}", STORAGE_EMULATOR_HOST=serve(Bucket))
    assert (done.returncode, outcome.get("file_count")) == (0, files), (done.stderr, Bucket.requests)
    assert (tmp_path / "staging/train.jsonl").read_bytes() == DATA


def test_an_object_that_is_not_in_the_google_bucket_is_named(importer, serve):
    done, outcome = importer("gs://bucket/missing.jsonl", STORAGE_EMULATOR_HOST=serve(Bucket))
    assert done.returncode == 5, done.stderr
    assert "gs://bucket/missing.jsonl: no such object" in outcome["error"]
