"""Models of the Hugging Face Hub: one pinned snapshot, out of the local cache where it is there already."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfslurm.errors import InvalidError, NotFoundError, NotPermittedError, UnreachableError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, as the Hub's cache holds them: links to its blobs."""

    folder: Path
    commit: str


def fetch(reference: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Snapshot:
    """The snapshot that `ID[@REVISION]` means now, of the files that match `wanted` and none of `unwanted`.

    A branch or tag becomes the commit that it names. Files that the cache holds are not fetched again, and with
    HF_HUB_OFFLINE=1, or where the Hub does not answer, the cache alone counts; the token is the user's usual one.
    https://huggingface.co/docs/huggingface_hub/guides/download

    Raises NotFoundError for an unknown model or revision, NotPermittedError where access has to be asked for,
    UnreachableError where neither Hub nor cache has it all, InvalidError for what is no ID.
    """
    from huggingface_hub import errors, snapshot_download

    name, _, revision = reference.partition("@")
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
            )
        )
    except errors.HFValidationError as error:
        raise InvalidError(f"'{name}' is no model on the Hub: {error}") from error
    except errors.GatedRepoError as error:
        hint = "Ask for access on its page, and log in here: hf auth login."
        raise NotPermittedError(f"{name} is gated: your account may not read it", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{name} has no revision '{revision}' on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        hint = "A private one needs a token: hf auth login."
        raise NotFoundError(f"there is no model '{name}' on the Hub", hint=hint) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        hint = "Elsewhere, `hf download` fills a cache that can be copied here (HF_HOME); or take --path."
        raise UnreachableError(f"{reference} cannot be had from the Hub: {_first_line(error)}", hint=hint) from error
    if not _COMMIT.fullmatch(folder.name):
        raise InvalidError(f"{folder} is no snapshot of a commit")
    return Snapshot(folder, folder.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
