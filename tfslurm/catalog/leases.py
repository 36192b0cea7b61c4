"""Leases: at most one process does a thing, and one that dies frees it by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from tfslurm import process
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Lease, now


@contextmanager
def lease(name: str, *, seconds: float, floor: float = 0.0) -> Iterator[bool]:
    """Hold the lease `name` for at most `seconds`; yields whether it was got.

    It is not got while somebody else holds it, nor within `floor` seconds of the last time it was taken. A holder
    on this host that was killed holds nothing.
    """
    holder = f"{socket.gethostname()} {process.handle(os.getpid())} {os.urandom(4).hex()}"
    taken = _take(name, holder, seconds, floor)
    try:
        yield taken
    finally:
        if taken:
            with write_transaction():
                Lease.update(expires_at=now()).where(Lease.name == name, Lease.holder == holder).execute()


def _take(name: str, holder: str, seconds: float, floor: float) -> bool:
    moment = now()
    with write_transaction():
        old = Lease.get_or_none(Lease.name == name)
        if old and (_held(old, moment) or (moment - old.renewed_at).total_seconds() < floor):
            return False
        Lease.replace(
            name=name, holder=holder, renewed_at=moment, expires_at=moment + timedelta(seconds=seconds)
        ).execute()
    return True


def _held(old: Lease, moment: datetime) -> bool:
    host, handle, _ = old.holder.split()
    return old.expires_at > moment and (host != socket.gethostname() or process.alive(handle))
