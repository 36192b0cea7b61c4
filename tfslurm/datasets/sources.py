"""Where an import comes from: a path, a URL, or standard input; and what of it may be shown.

A URL may hold secrets: a signature in its query, a password before its host. `given` is what the
user typed and stays in memory and in one file that only its owner may read; everything that is
stored, printed or logged says `shown`. Other credentials come from the environment or the usual
files (`~/.aws`, `~/.config/gcloud`, `~/.cache/huggingface`, `~/.netrc`) and pass through here never.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tfslurm.errors import InvalidError

STDIN = "-"

PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "hf": ("huggingface_hub", "hf"), "http": None, "https": None}
"""By scheme: the package that reads it, and the extra that installs that; None where nothing is needed."""

EXAMPLES = "a path, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, hf://datasets/OWNER/NAME/FILE, https://HOST/FILE or -"

_HIDDEN = "***"
_SIGNED_URL = re.compile(r"""(https?://[^\s'"<>?]+)\?[^\s'"<>]+""", re.IGNORECASE)
_USERINFO = re.compile(r"""([a-z][a-z0-9+.-]*://)[^\s/'"<>@]+@""", re.IGNORECASE)
_PARAMETERS = re.compile(r"\?[\w.-]+=.*$", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """What to import; `scheme` is "" for a path and "-" for standard input."""

    scheme: str
    shown: str
    given: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Source:
        """A local path becomes absolute. Raises InvalidError for a URL that cannot be imported; no secret is in it."""
        if text == STDIN:
            return cls(STDIN, STDIN, STDIN)
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        if not separator or scheme == "file":
            path = os.path.abspath(unquote(rest) if separator else text)
            return cls("", path, path)
        source = cls(scheme, _without_secrets(scheme, text), text)
        source._check()
        return source

    @property
    def remote(self) -> bool:
        return self.scheme not in ("", STDIN)

    @property
    def web(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def secret(self) -> bool:
        """Whether what was given is more than may be shown."""
        return self.given != self.shown

    def scrub(self, text: str) -> str:
        """`text` without the secrets of this source, nor the queries and passwords of any other URL in it."""
        for secret in self._secrets():
            text = text.replace(secret, _HIDDEN)
        return _USERINFO.sub(r"\1", _SIGNED_URL.sub(rf"\1?{_HIDDEN}", text))

    def check_package(self) -> None:
        """Raises InvalidError naming the extra to install, where the package that reads this is missing."""
        needed = PACKAGES[self.scheme] if self.remote else None
        if needed and not all(importlib.util.find_spec(name) for name in ("fsspec", needed[0])):
            raise InvalidError(
                f"{self.shown}: to read {self.scheme}://, Python needs {needed[0]}.",
                hint=f"pip install 'tfslurm[{needed[1]}]'",
            )

    def _check(self) -> None:
        if self.scheme not in PACKAGES:
            raise InvalidError(f"{self.shown}: {self.scheme}:// cannot be imported.", hint=f"Name {EXAMPLES}.")
        if any(ord(character) <= 32 or ord(character) == 127 for character in self.given) and self.web:
            raise InvalidError(f"{self.shown}: a URL has no blanks.", hint="Write them as %20.")
        parts = _split(self.given, self.shown)
        if not parts.netloc.rpartition("@")[2]:
            raise InvalidError(f"{self.shown}: names no host or bucket.", hint=f"Name {EXAMPLES}.")
        if self.web and parts.path.rpartition("/")[2] == "":
            raise InvalidError(f"{self.shown}: names no file.", hint="A web server cannot be listed: name one file.")
        if not self.web and "@" in parts.netloc:
            raise InvalidError(
                f"{self.shown}: credentials do not belong into this URL.",
                hint="They are read from the environment or the usual files, such as ~/.aws/credentials.",
            )
        if self.scheme == "hf" and not re.match(r"hf://datasets/[^/]+/[^/]+", self.given, re.IGNORECASE):
            raise InvalidError(f"{self.shown}: is no dataset.", hint="Write hf://datasets/OWNER/NAME[@REVISION]/FILES.")

    def _secrets(self) -> list[str]:
        """The longest first, so that no part of one stays."""
        if not self.secret:
            return []
        query = self.given.partition("?")[2]
        userinfo = self.given.partition("://")[2].partition("/")[0].rpartition("@")[0]
        values = [pair.partition("=")[2] for pair in query.partition("#")[0].split("&")]
        password = userinfo.partition(":")[2]
        # A short value, such as 1, is no secret, and stands in many words.
        short = [value for value in (*values, password) if len(value) >= 6]
        found = {self.given, query, userinfo, *short, *map(unquote, [query, userinfo, *short])}
        return sorted(found - {""}, key=len, reverse=True)


def _split(text: str, shown: str):
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise InvalidError(f"{shown}: is no URL.") from error
    return parts


def _without_secrets(scheme: str, text: str) -> str:
    """Without user, password and query; in a bucket's URL `?` may stand for a character, and is kept there."""
    text = _USERINFO.sub(r"\1", text.partition("#")[0] if scheme in ("http", "https") else text)
    return text.partition("?")[0] if scheme in ("http", "https") else _PARAMETERS.sub("", text)
