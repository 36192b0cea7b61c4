from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tfslurm.errors import InvalidError, NotFoundError, NotPermittedError, UnreachableError
from tfslurm.serving.client import complete_chat, example_request, stream_chat

ASK = [{"role": "user", "content": "Hi"}]


@dataclass
class Server:
    """Answers every POST with what the test put in, and keeps what was asked."""

    url: str = ""
    status: int = 200
    body: str = ""
    length: int | None = None
    requests: list[tuple[str, dict[str, str], dict]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    canned = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            canned.requests.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(canned.status)
            self.send_header("Content-Length", str(canned.length or len(canned.body.encode())))
            self.end_headers()
            self.wfile.write(canned.body.encode())

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    canned.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield canned
    http.shutdown()
    http.server_close()


def chunks(*pieces: str) -> str:
    events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events += [{"choices": [{"delta": {}}]}, {"choices": [], "usage": {"total_tokens": 3}}]
    return ": a comment\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def test_an_answer_comes_whole(server: Server) -> None:
    server.body = json.dumps({"choices": [{"message": {"content": "Grüß dich"}}]})
    assert complete_chat(server.url, "k1", "helpdesk", ASK, max_tokens=5, temperature=0) == "Grüß dich"
    [(path, headers, request)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k1"
    assert request == {"model": "helpdesk", "messages": ASK, "max_tokens": 5, "temperature": 0}


def test_an_answer_comes_in_pieces(server: Server) -> None:
    server.body = chunks("Hel", "lo") + "data: [DONE]\n\n"
    assert "".join(stream_chat(server.url, "k1", "helpdesk", ASK)) == "Hello"
    assert server.requests[0][2] == {"model": "helpdesk", "messages": ASK, "stream": True}


def test_a_stream_that_breaks_off_is_an_error_after_its_pieces(server: Server) -> None:
    server.body = chunks("Hel")
    seen = []
    with pytest.raises(UnreachableError, match="broke off"):
        for piece in stream_chat(server.url, "k1", "helpdesk", ASK):
            seen.append(piece)
    assert "".join(seen) == "Hel"


def test_an_error_inside_a_stream_is_raised(server: Server) -> None:
    server.body = chunks("Hel") + 'data: {"error": {"message": "the engine died"}}\n\n'
    with pytest.raises(UnreachableError, match="broke off: the engine died"):
        list(stream_chat(server.url, "k1", "helpdesk", ASK))


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (401, '{"error": "Unauthorized"}', NotPermittedError, "does not accept this key"),
        (404, '{"error": {"message": "no such model"}}', NotFoundError, "does not serve 'helpdesk': no such model"),
        (400, '{"error": {"message": "too long"}}', InvalidError, "refused the request: too long"),
        (422, '{"detail": "bad field"}', InvalidError, "refused the request: bad field"),
        (500, "<html>", UnreachableError, "cannot answer now .500.: Internal Server Error"),
        (200, "<html>", UnreachableError, "not a chat completion"),
    ],
)
def test_a_refusal_says_what_is_wrong(
    server: Server, status: int, body: str, error: type[Exception], words: str
) -> None:
    server.status, server.body = status, body
    with pytest.raises(error, match=words) as raised:
        complete_chat(server.url, "k-secret", "helpdesk", ASK)
    assert "k-secret" not in str(raised.value)


def test_no_server_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match="http://127.0.0.1:9/v1 cannot be reached: Connection refused"):
        complete_chat("http://127.0.0.1:9/v1", "k1", "helpdesk", ASK)


def test_a_truncated_answer_is_unreachable(server: Server) -> None:
    server.body, server.length = "{", 100
    with pytest.raises(UnreachableError, match="cannot be reached"):
        complete_chat(server.url, "k1", "helpdesk", ASK, timeout=1)


def test_the_proxy_of_the_site_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.body = json.dumps({"choices": [{"message": {"content": "direct"}}]})
    assert complete_chat(server.url, "k1", "helpdesk", ASK) == "direct"


def test_the_example_works_when_pasted(server: Server) -> None:
    server.body = "pasted"
    example = example_request(server.url, "it's mine")
    ran = subprocess.run(["sh", "-c", example], capture_output=True, text=True, env={"TFSLURM_KEY": "k1"}, timeout=20)
    assert ran.stdout == "pasted"
    [(path, headers, request)] = server.requests
    assert (path, headers["Authorization"], request["model"]) == ("/v1/chat/completions", "Bearer k1", "it's mine")
