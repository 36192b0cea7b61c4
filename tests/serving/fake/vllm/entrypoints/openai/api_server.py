"""Plays vLLM's server with the failures that the real one does not produce on demand.

The folder $FAKE_ENGINE steers it. `mode` is read at every request: ok, silent (completions are
never answered), busy (the same, but iterations are counted), refusing (401), bare (no adapter).
`start` is read once: ok, broken (an error and exit 3), taken-once (the first start cannot bind),
deaf (SIGTERM is ignored). `starts` gets a line with pid and port for each start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTROL = Path(os.environ["FAKE_ENGINE"])
OPTIONS = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
ADAPTER = json.loads(OPTIONS["--lora-modules"])["name"]
MODELS = [OPTIONS["--served-model-name"], ADAPTER]
iterations = 0


def word(name: str) -> str:
    path = CONTROL / name
    return path.read_text() if path.exists() else "ok"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global iterations
        if self.path == "/metrics":
            iterations += word("mode") == "busy"
            self.answer(200, f'vllm:iteration_tokens_total_count{{engine="0"}} {iterations}.0\n')
        elif self.path == "/v1/models":
            names = MODELS[:1] if word("mode") == "bare" else MODELS
            self.answer(200, json.dumps({"data": [{"id": name} for name in names]}))
        else:
            self.answer(200, "")

    def do_POST(self) -> None:
        global iterations
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if word("mode") in ("silent", "busy"):
            time.sleep(3600)
        elif word("mode") == "refusing" or self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, json.dumps({"error": "Unauthorized"}))
        else:
            iterations += 1
            self.answer(200, json.dumps({"model": request["model"], "choices": [{"text": "!"}]}))

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


def main() -> None:
    with open(CONTROL / "starts", "a") as starts:
        starts.write(f"{os.getpid()} {OPTIONS['--port']}\n")
    if word("start") == "broken":
        sys.exit("ValueError: no kernel for this quantization, key " + os.environ["VLLM_API_KEY"])
    if word("start") == "taken-once" and len((CONTROL / "starts").read_text().splitlines()) == 1:
        sys.exit("OSError: [Errno 98] Address already in use")
    subprocess.Popen(["sleep", "3600"])  # As vLLM's EngineCore, it outlives its parent's kill -9.
    server = ThreadingHTTPServer((OPTIONS["--host"], int(OPTIONS["--port"])), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN if word("start") == "deaf" else lambda *_: os._exit(0))
    server.serve_forever()


main()
