"""`model add --hf`: from a cache in the Hub's layout, and from a small server that speaks the Hub's protocol.

The Hub itself is NOT reached by these tests.
"""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from tfslurm.catalog.models import BaseModel

OLD, NEW = "a" * 40, "b" * 40


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers of the model `o/tiny`, whose main is NEW. https://huggingface.co/docs/hub/api"""

    files: dict[str, bytes]
    requests: list[tuple[str, str]]
    status = 200

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append((path, self.headers["Authorization"] or ""))
        if self.status != 200:
            return self.answer(b"{}", self.status)
        if path.startswith("/api/models/o/gated"):
            return self.answer(b'{"error": "gated"}', 403, **{"X-Error-Code": "GatedRepo"})
        if path in ("/api/models/o/tiny", "/api/models/o/tiny/revision/main"):
            return self.answer(json.dumps({"id": "o/tiny", "sha": NEW, "siblings": [], "tags": []}).encode())
        if path.startswith("/api/models/o/tiny/revision/"):
            return self.answer(b'{"error": "Invalid rev id"}', 404, **{"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/o/tiny/tree/"):
            return self.answer(json.dumps([self.entry(name) for name in self.files]).encode())
        if path.startswith(f"/o/tiny/resolve/{NEW}/"):
            return self.file(path.removeprefix(f"/o/tiny/resolve/{NEW}/"))
        return self.answer(b'{"error": "Repository not found"}', 401, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def entry(self, name):
        return {"type": "file", "path": name, "oid": f"{len(name):040x}", "size": len(self.files[name])}

    def file(self, name):
        self.answer(self.files[name], **{"X-Repo-Commit": NEW, "ETag": f'"{len(name):040x}"'})

    def answer(self, data, status=200, **headers):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny):
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    junk = {"onnx/model.safetensors": b"x", "consolidated.safetensors": b"x", "pytorch_model.bin": b"x"}
    handler = type("Handler", (Hub,), {"files": files | junk, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, tiny):
    """A cache that holds commit OLD of `o/tiny` as main, in the Hub's layout: links to blobs."""
    repository = tmp_path / "hf/hub/models--o--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / OLD
    for folder in (blobs, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(OLD)
    for path in tiny.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return tmp_path / "hf"


def add(installation, reference, check=0, **environment):
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": "http://127.0.0.1:9"} | environment
    return installation.run("model", "add", "m", "--hf", reference, "--json", check=check, **environment)


@pytest.mark.parametrize("reference", ["o/tiny", "o/tiny@main", f"o/tiny@{OLD}"])
def test_a_cached_model_is_staged_without_the_hub_and_pinned_to_its_commit(installation, cache, tiny, reference):
    made = json.loads(add(installation, reference, HF_HOME=str(cache), HF_HUB_OFFLINE="1").stdout)
    assert (made["revision"], made["source"]) == (OLD, f"hf://o/tiny@{OLD}")
    staged = installation.root.model("m")
    assert (staged / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert not any(path.is_symlink() for path in staged.iterdir())
    assert "revision" not in made["metadata"] and made["metadata"]["architecture"] == "LlamaForCausalLM"


def test_a_model_of_the_hub_is_fetched_with_the_users_token_and_without_other_programs_weights(
    installation, hub, tmp_path
):
    home = tmp_path / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("hf_" + "x" * 34)
    done = add(installation, "o/tiny", HF_ENDPOINT=hub.url, HOME=str(home))
    made = json.loads(done.stdout)
    assert (made["revision"], made["source"]) == (NEW, f"hf://o/tiny@{NEW}")
    names = {path.name for path in installation.root.model("m").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"onnx", "consolidated.safetensors", "pytorch_model.bin"}
    assert not any("onnx" in path or "consolidated" in path or ".bin" in path for path, _ in hub.requests)
    assert {who for path, who in hub.requests if "/o/tiny" in path} == {"Bearer hf_" + "x" * 34}
    assert "hf_x" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("reference", "code", "said"),
    [
        ("o/other", 3, "there is no model 'o/other' on the Hub"),
        ("o/tiny@v9", 3, "o/tiny has no revision 'v9' on the Hub"),
        ("o/gated", 6, "o/gated is gated: your account may not read it"),
        ("not/an/id", 5, "'not/an/id' is no model on the Hub"),
        ("", 5, "'' is no model on the Hub"),
    ],
)
def test_what_the_hub_refuses_keeps_its_meaning_and_registers_nothing(installation, hub, reference, code, said):
    before = installation.everything()
    done = add(installation, reference, check=code, HF_ENDPOINT=hub.url)
    assert f"Error: {said}" in done.stderr and "Traceback" not in done.stderr
    assert installation.everything() == before


def test_where_neither_hub_nor_cache_has_it_the_hub_is_unreachable(installation, hub):
    assert "Error: o/tiny cannot be had from the Hub" in add(installation, "o/tiny", check=7, HF_HUB_OFFLINE="1").stderr
    assert "cannot be had from the Hub" in add(installation, "o/tiny", check=7).stderr
    hub.status = 503
    assert "cannot be had from the Hub" in add(installation, "o/tiny", check=7, HF_ENDPOINT=hub.url).stderr
    assert BaseModel.select().count() == 0 and list(installation.root.model("m").parent.iterdir()) == []
