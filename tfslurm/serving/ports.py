"""A TCP port that stays ours while the engine starts, dies and starts again."""

from __future__ import annotations

import socket
from types import TracebackType

from tfslurm.errors import UnreachableError


class Reservation:
    """A port bound by this process and never listened on.

    Linux lets a second socket bind a port when both set SO_REUSEADDR and neither listens: vLLM's
    does (`create_server_socket`), so it takes the port beside the reservation, while the kernel
    hands the number to nobody who asks for a free one, also between two starts of the engine.
    Someone who asks for this very number can still win; then vLLM exits with "address in use".
    """

    def __init__(self, host: str, port: int = 0) -> None:
        """Raises UnreachableError where `port` is taken; 0 picks a free one."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise UnreachableError(f"Port {port} of {host} cannot be bound: {error.strerror}.") from error
        self.port: int = self._socket.getsockname()[1]

    def release(self) -> None:
        self._socket.close()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
