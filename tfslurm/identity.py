"""Who acts, and what new things are called."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import time

from tfslurm.errors import InvalidError

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, in lower case: no letter looks like a digit."""

PREFIXES = {"dataset": "ds", "job": "job", "checkpoint": "ckpt", "endpoint": "ep", "sweep": "sw"}

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
ID = re.compile(rf"({'|'.join(PREFIXES.values())})-[{ALPHABET}]{{16}}")


def current_user() -> str:
    """The name of the user who runs this process; the bare number for a uid without an account."""
    uid = os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def new_id(kind: str) -> str:
    """A fresh id: the kind, ten characters of time in milliseconds, six of chance. Ids sort by their time."""
    return new_ids(kind, 1)[0]


def new_ids(kind: str, count: int) -> list[str]:
    """Fresh ids that sort in the order in which they are given; up to a million at once."""
    first = (time.time_ns() // 1_000_000) << 30 | secrets.randbits(30) >> (count > 1)
    return [f"{PREFIXES[kind]}-{_digits(first + number)}" for number in range(count)]


def _digits(number: int) -> str:
    return "".join(ALPHABET[number >> shift & 31] for shift in range(75, -1, -5))


def checkpoint_id(job_id: str) -> str:
    """The id of the one checkpoint that a job may produce: known beforehand, so registering it twice is once."""
    return f"{PREFIXES['checkpoint']}-{job_id.partition('-')[2]}"


def job_id_of(checkpoint: str) -> str:
    """The id of the job that may produce the checkpoint of this id."""
    return f"{PREFIXES['job']}-{checkpoint.partition('-')[2]}"


def check_name(name: str) -> str:
    """`name`, if an object may be called so.

    Raises InvalidError: names go into URLs, folders and commands, and must not look like ids.
    """
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"name '{name}' is not allowed",
            hint="Use 1 to 63 lower-case letters, digits, '.', '_' and '-', with a letter or digit at both ends.",
        )
    if ID.fullmatch(name):
        raise InvalidError(f"name '{name}' looks like an id", hint="Choose a name that says what it is.")
    return name
