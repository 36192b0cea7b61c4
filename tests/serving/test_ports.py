from __future__ import annotations

import socket

import pytest

from tfslurm.errors import UnreachableError
from tfslurm.serving.ports import Reservation


def server(port: int) -> socket.socket:
    """Bound and listening as vLLM does it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_an_engine_takes_the_reserved_port_again_and_again() -> None:
    with Reservation("127.0.0.1") as reservation:
        for _ in range(3):
            with server(reservation.port), socket.create_connection(("127.0.0.1", reservation.port), timeout=1):
                pass


def test_nobody_who_asks_for_a_free_port_gets_a_reserved_one() -> None:
    with Reservation("127.0.0.1") as reservation:
        others = [Reservation("127.0.0.1") for _ in range(200)]
        assert reservation.port not in {other.port for other in others}
        assert len({other.port for other in others}) == 200
        for other in others:
            other.release()


def test_a_reserved_port_refuses_connections_until_the_engine_listens() -> None:
    with Reservation("127.0.0.1") as reservation, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", reservation.port), timeout=1)


def test_a_port_that_someone_listens_on_is_not_reserved() -> None:
    with Reservation("127.0.0.1") as reservation:
        port = reservation.port
    with server(port), pytest.raises(UnreachableError, match=f"Port {port} of 127.0.0.1 cannot be bound"):
        Reservation("127.0.0.1", port)
