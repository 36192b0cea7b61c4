"""One file on a web server, read in ranges that are surely of the same version.

Not through fsspec, whose HTTP file system neither sends If-Range nor notices that a server ignores
the range. RFC 9110: conditional requests (13), ranges (14), and which validators are strong (8.8.1).
"""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from tfslurm import __version__
from tfslurm.datasets.files import SUFFIXES
from tfslurm.datasets.retries import NO_SUCH_HOST, Changed, NoRanges, Transient, missing_credentials, of_status
from tfslurm.datasets.sources import Source
from tfslurm.datasets.stores import Remote
from tfslurm.errors import InvalidError

TIMEOUT = 60.0
"""Seconds of silence after which a connection counts as lost."""
BLOCK = 1024 * 1024


class WebStore:
    """A URL. Proxies are those of the environment; user and password those of the URL or of ~/.netrc."""

    def __init__(self, source: Source, timeout: float = TIMEOUT) -> None:
        self.source, self.timeout = source, timeout
        self.url, self._authorization = _login(source)
        self._opener = urllib.request.build_opener(_Redirects)

    def list(self) -> list[Remote]:
        """The one object; a GET of its first byte, since many servers (and signed URLs) refuse HEAD."""
        with self._get({"Range": "bytes=0-0"}) as response:
            headers, ranges = response.headers, response.status == 206
            length = headers["Content-Range"].rpartition("/")[2] if ranges else headers["Content-Length"]
            size = int(length) if length and length.isdigit() else None
            version = validator(headers)
            name = _name(self.url, headers)
            self._check_encoding(headers, name)
        return [Remote(name, self.url, size, version, ranges and size is not None and version is not None)]

    def read(self, remote: Remote, start: int, end: int | None) -> Iterator[bytes]:
        if end is None:
            headers = {}
        else:
            headers = {"Range": f"bytes={start}-{end - 1}", "If-Range": remote.version}
        with self._get(headers) as response:
            expected = _expected(response, remote, start, end)
            with self._translated():
                while block := response.read(BLOCK):
                    yield block
                    expected = None if expected is None else expected - len(block)
        if expected:
            raise Transient(f"the connection ended {expected:,} bytes early")

    @contextmanager
    def _get(self, headers: dict[str, str]) -> Iterator[Any]:
        headers = {"Accept-Encoding": "identity", "User-Agent": f"tfslurm/{__version__}", **headers}
        request = urllib.request.Request(self.url, headers=headers)
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        with self._translated():
            try:
                response = self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                if error.code != 416 or not error.headers.get("Content-Range", "").endswith("/0"):
                    raise
                response = _Empty(error.headers)  # an empty file has no first byte
        with response:
            yield response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            error.close()
            after = error.headers.get("Retry-After", "")
            words = http.client.responses.get(error.code, "")
            raise of_status(self.source.shown, error.code, words, float(after) if after.isdigit() else 0.0) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._meaning(error) from error

    def _meaning(self, error: Exception) -> Exception:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        said = self.source.scrub(str(reason) or type(reason).__name__)
        if isinstance(reason, socket.gaierror) and reason.errno in NO_SUCH_HOST:
            return InvalidError(f"{self.source.shown}: there is no host of that name.")
        if isinstance(reason, (ssl.SSLCertVerificationError, http.client.InvalidURL, _Refused)):
            return InvalidError(f"{self.source.shown}: {said}")
        return Transient(said)

    def _check_encoding(self, headers: Message, name: str) -> None:
        coding = headers.get("Content-Encoding", "identity")
        if coding != "identity" and not (coding == "gzip" and name.endswith(".gz")):
            raise InvalidError(
                f"{self.source.shown}: the server sends it packed as {coding}, though it was asked not to.",
                hint="Ask for the file as it is stored, or import the packed file under its own name.",
            )


def validator(headers: Message) -> str | None:
    """What a range may be made conditional on: a strong ETag, else the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _expected(response: Any, remote: Remote, start: int, end: int | None) -> int | None:
    """How many bytes must come, None where nobody says. Raises Changed, NoRanges."""
    if remote.version is not None and validator(response.headers) != remote.version:
        raise Changed("it was replaced")
    length = response.headers["Content-Length"]
    if end is None:
        return int(length) if length and length.isdigit() else None
    if response.status != 206:
        raise NoRanges("the server sends all of it")
    if response.headers["Content-Range"] != f"bytes {start}-{end - 1}/{remote.size}":
        raise Changed(f"the server sends {response.headers['Content-Range']}")
    return end - start


def _login(source: Source) -> tuple[str, str | None]:
    """The URL without user and password, and the header that says them."""
    parts = urlsplit(source.given)
    userinfo, _, place = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme, place, parts.path, parts.query, ""))
    if userinfo:
        user, _, password = userinfo.partition(":")
    else:
        user, password = _from_netrc(source, parts.hostname or "")
        if not user:
            return url, None
    return url, "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


def _from_netrc(source: Source, host: str) -> tuple[str, str]:
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (FileNotFoundError, RuntimeError):  # the latter: no home folder
        return "", ""
    except (netrc.NetrcParseError, OSError) as error:
        raise missing_credentials(source.shown, f"~/.netrc: {error}") from None
    return (found[0], found[2]) if found else ("", "")


def _name(url: str, headers: Message) -> str:
    """The file's name: the URL's, or what the server calls it where the URL's is not one of a data file."""
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not name.endswith(SUFFIXES):
        suggested = re.sub(r".*[/\\]", "", headers.get_filename() or "")
        name = suggested if suggested.endswith(SUFFIXES) else name
    return name


class _Refused(OSError):
    """A redirect that is not followed."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; credentials go to the same server only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        there, here = urlsplit(newurl), urlsplit(req.full_url)
        if there.scheme != here.scheme and there.scheme != "https":
            raise _Refused(f"the server redirects from {here.scheme} to {there.scheme}, which is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and (there.scheme, there.netloc) == (here.scheme, here.netloc) and req.has_header("Authorization"):
            request.add_unredirected_header("Authorization", req.get_header("Authorization"))
        return request


class _Empty:
    """The answer for a file of no bytes."""

    status = 200

    def __init__(self, headers: Message) -> None:
        self.headers = headers
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = "0"

    def __enter__(self) -> _Empty:
        return self

    def __exit__(self, *_: object) -> None:
        pass
