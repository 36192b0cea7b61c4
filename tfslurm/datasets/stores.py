"""Objects that lie elsewhere: listed with their versions, and read in parts.

Buckets and the Hugging Face Hub are read through fsspec; web servers through `web.WebStore`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tfslurm.datasets.retries import NO_SUCH_HOST, Changed, Missing, Transient, missing_credentials, of_status
from tfslurm.datasets.sources import Source
from tfslurm.errors import InvalidError, NotPermittedError, TfslurmError


@dataclass(frozen=True)
class Remote:
    """An object as it was listed.

    `name` is its path in the dataset, `address` what its store calls it, `size` its bytes, None where
    nobody says; `version` changes whenever the bytes do, None where nobody says. Without `ranges` it
    can only be read whole.
    """

    name: str
    address: str
    size: int | None
    version: str | None
    ranges: bool = True


class Store(Protocol):
    """Where objects lie. Both methods raise Transient, or a TfslurmError that says what is wrong for good."""

    def list(self) -> list[Remote]:
        """Everything that the source names, as it is now."""
        ...

    def read(self, remote: Remote, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes from `start` up to `end` (None: all there are), in blocks.

        Raises Changed where the object is no longer the one that was listed, Missing where it is gone, NoRanges
        where the server sends all of it after all.
        """
        ...


def open_store(source: Source) -> Store:
    """Raises InvalidError where the package for it is missing."""
    if source.web:
        from tfslurm.datasets.web import WebStore

        return WebStore(source)
    source.check_package()
    import fsspec

    # Neither instances nor listings are kept: what is listed is what is there now.
    filesystem = fsspec.filesystem(source.scheme, skip_instance_cache=True, use_listings_cache=False)
    return FsspecStore(filesystem, source)


class FsspecStore:
    """An object, a folder or a glob of any file system that fsspec knows."""

    def __init__(self, filesystem: Any, source: Source) -> None:
        self.filesystem, self.source = filesystem, source
        self.path = filesystem._strip_protocol(source.given)

    def list(self) -> list[Remote]:
        with translated(self.source):
            self.filesystem.invalidate_cache()
            found, top = self._find()
        if not found:
            raise InvalidError(f"{self.source.shown}: no such object, folder or bucket, and no object matches it.")
        return [
            Remote(path.removeprefix(top), path, info["size"], version_of(info))
            for path, info in sorted(found.items())
            if info["type"] == "file" and not path.endswith("/")
        ]

    def _find(self) -> tuple[dict[str, dict[str, Any]], str]:
        """What the path names, and the folder below which it keeps its name, with a slash at the end."""
        try:
            info = self.filesystem.info(self.path)
        except FileNotFoundError:
            return self._glob()
        path = info["name"].rstrip("/")
        if info["type"] == "file":
            return {path: info}, path[: path.rfind("/") + 1]
        return self.filesystem.find(path, detail=True), f"{path}/"

    def _glob(self) -> tuple[dict[str, dict[str, Any]], str]:
        if not any(character in self.path for character in "*?["):
            return {}, ""
        try:
            found = self.filesystem.glob(self.path, detail=True)
        except FileNotFoundError:
            return {}, ""
        parents = [path.rpartition("/")[0] for path, info in found.items() if info["type"] == "file"]
        return found, os.path.commonpath(parents) + "/" if parents else ""

    def read(self, remote: Remote, start: int, end: int | None) -> Iterator[bytes]:
        with translated(self.source):
            # S3 is asked for the version that `open` sees (If-Match); the listing at the end covers the others.
            with self.filesystem.open(remote.address, "rb", cache_type="none") as file:
                seen = getattr(file, "details", None) or self.filesystem.info(remote.address)
                if (seen["size"], version_of(seen)) != (remote.size, remote.version):
                    raise Changed("it was replaced")
                file.seek(start)
                yield file.read(-1 if end is None else end - start)


def version_of(info: dict[str, Any]) -> str | None:
    """What says that an object has the same bytes: the strongest that its file system tells."""
    large = info.get("lfs") or {}
    for value in (large.get("sha256"), *(info.get(key) for key in _VERSIONS)):
        if value:
            return str(value).strip('"')
    return None


_VERSIONS = ("generation", "ETag", "etag", "xet_hash", "blob_id", "md5Hash", "LastModified", "mtime", "created")


@contextmanager
def translated(source: Source) -> Iterator[None]:
    """Turn what fsspec's file systems raise into Transient, Changed, or an error that names source and cause.

    An exception that is none of their ways to say no is a fault of ours, and passes.
    """
    try:
        yield
    except (TfslurmError, Transient, Changed):
        raise
    except Exception as error:
        meant = _meaning(source, error)
        if meant is None:
            raise
        raise meant from error


def _meaning(source: Source, error: Exception) -> Exception | None:
    chain = list(_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    said = source.scrub(f"{error}" or type(error).__name__)
    if "FileExpired" in kinds:
        return Changed("it was replaced")
    if kinds & _NO_CREDENTIALS:
        return missing_credentials(source.shown, said)
    if any(isinstance(link, socket.gaierror) and link.errno in NO_SUCH_HOST for link in chain):
        return InvalidError(f"{source.shown}: there is no host of that name: {said}")
    status = next((status for link in chain if (status := _status(link))), None)
    if status:
        return of_status(source.shown, status, said)
    if isinstance(error, FileNotFoundError):
        return Missing(f"{source.shown}: no such object, folder or bucket: {said}")
    if isinstance(error, PermissionError):
        return NotPermittedError(f"{source.shown}: not permitted: {said}")
    if "ParamValidationError" in kinds or isinstance(error, NotImplementedError):
        return InvalidError(f"{source.shown}: {said}")
    passing = isinstance(error, (OSError, TimeoutError, EOFError))
    return Transient(said) if passing or type(error).__module__.partition(".")[0] in _CLIENTS else None


_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "DefaultCredentialsError", "RefreshError", "LocalTokenNotFoundError",
}  # fmt: skip
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "google", "gcsfs", "httpcore", "httpx", "httpx2", "requests"}
"""Packages whose other exceptions are about the connection."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and what it was raised from: the innermost says what happened."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or getattr(error, "os_error", None) or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of botocore, aiohttp, gcsfs, requests or httpx carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and 400 <= found < 600 else None
