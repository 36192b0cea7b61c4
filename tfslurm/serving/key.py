"""An endpoint's API key, on disk."""

from __future__ import annotations

from pathlib import Path

from tfslurm.errors import ConfigurationError, NotPermittedError


def read_key(path: Path) -> str:
    """The API key; NotPermittedError where it is not the caller's, or where others may read or change it."""
    try:
        mode = path.stat().st_mode
        key = path.read_text().strip()
    except PermissionError as error:
        raise NotPermittedError(f"{path}: the endpoint's key is not yours to read.") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: the endpoint's key cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise NotPermittedError(
            f"{path}: others may read the key (mode {mode & 0o777:04o}).", hint=f"chmod 600 {path}, and make a new key."
        )
    if not key:
        raise ConfigurationError(f"{path}: the key is empty.")
    return key
