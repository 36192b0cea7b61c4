"""A real web server on a port of its own, whose files can fail in the ways that files on the web do."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class File:
    """`faults` are statuses to answer first; the first `cuts` answers with data end after `cut` bytes of it."""

    data: bytes
    etag: str | None = '"v1"'
    modified: str | None = "Sat, 21 Nov 2026 10:00:00 GMT"
    ranges: bool = True
    length: bool = True
    faults: list[int] = field(default_factory=list)
    cut: int = 0
    cuts: int = 0
    redirect: str | None = None
    login: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[File, str | None], None] = lambda file, span: None
    """Called with the Range header before each answer."""


class WebServer:
    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """(path with its query, Range or "", headers) of every request."""
        self.sent = 0
        """Bytes of data that went out, without those that were sent to look at the first byte."""
        self.lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def add(self, path: str, data: bytes, **options) -> str:
        """Serve `data`; its URL."""
        self.files[path] = File(data, **options)
        return f"http://{self.place}{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: WebServer

    def do_GET(self) -> None:
        state, span = self.server_state, self.headers["Range"]
        with state.lock:
            state.requests.append((self.path, span or "", dict(self.headers)))
            file = state.files.get(self.path.partition("?")[0])
            if file is None:
                return self._plain(404)
            if file.login and self.headers["Authorization"] != file.login:
                return self._plain(401)
            if file.faults:
                return self._plain(file.faults.pop(0))
            if file.redirect:
                return self._plain(302, Location=file.redirect)
        file.before(file, span)
        self._send(file, span)

    def _plain(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, file: File, span: str | None) -> None:
        data, status, extra = file.data, 200, {}
        asked = self.headers["If-Range"]
        if span and file.ranges and (asked is None or asked in (file.etag, file.modified)):
            start, end = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
            if start >= len(data):
                return self._plain(416, **{"Content-Range": f"bytes */{len(data)}"})
            status, data = 206, data[start : end + 1]
            extra = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{len(file.data)}"}
        self.send_response(status)
        if file.length:
            extra["Content-Length"] = str(len(data))
        if file.etag:
            extra["ETag"] = file.etag
        if file.modified:
            extra["Last-Modified"] = file.modified
        for name, value in {**extra, **file.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self._write(file, data, looked=span == "bytes=0-0")

    def _write(self, file: File, data: bytes, looked: bool) -> None:
        with self.server_state.lock:
            cut = file.cuts > 0 and not looked
            if cut:
                data, file.cuts = data[: file.cut], file.cuts - 1
        try:
            self.wfile.write(data)
            with self.server_state.lock:
                self.server_state.sent += 0 if looked else len(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side has seen enough
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def text_rows(size: int) -> bytes:
    """Rows of the text format, about `size` bytes, no two alike."""
    rows, made = [], 0
    while made < size:
        text = hashlib.sha256(str(len(rows)).encode()).hexdigest() * 16
        rows.append(b'{"text": "%d %s"}\n' % (len(rows), text.encode()))
        made += len(rows[-1])
    return b"".join(rows)
