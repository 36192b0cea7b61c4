"""Keeps one endpoint's engine up on this node.

    python -m tfslurm.serving.supervisor FOLDER

FOLDER holds `serving.json` and `key` (mode 0600). The supervisor verifies the checkpoint, starts
vLLM, probes it by a completion on the adapter, restarts it when it dies or hangs, and publishes
`state.json` at every change and every heartbeat. SIGTERM, SIGINT or a file `stop` in FOLDER
drains and ends it (exit 0); when it gives up it exits with 1. `outcome.json` says which:
`{"result": "stopped"}` or `{"result": "failed", "error": …}`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tfslurm.artifacts.manifest import verify_folder
from tfslurm.errors import ConfigurationError, TfslurmError, UnreachableError, UsageError
from tfslurm.files import write_json
from tfslurm.paths import EndpointPaths
from tfslurm.serving import command
from tfslurm.serving.config import ServingConfig
from tfslurm.serving.engine import Engine
from tfslurm.serving.health import Health, Restarts, Status
from tfslurm.serving.key import read_key
from tfslurm.serving.pace import Pace
from tfslurm.serving.ports import Reservation
from tfslurm.serving.probe import Probe
from tfslurm.serving.state import Board
from tfslurm.serving.watch import Watch


class EndpointFailed(TfslurmError):
    """The engine could not be kept up."""


@dataclass
class Supervisor:
    """One endpoint on this node; `run` returns when it is stopped and raises when it gives up."""

    paths: EndpointPaths
    config: ServingConfig
    key: str
    pace: Pace
    board: Board
    environment: Mapping[str, str]
    python: str = sys.executable
    _reservation: Reservation | None = field(default=None, init=False)
    _signalled: bool = field(default=False, init=False)

    def run(self) -> None:
        """Raises EndpointFailed after too many restarts in a row."""
        restarts = Restarts()
        while not self._stopping():
            health, reason, lines = self._live(restarts)
            if self._stopping():
                return
            following = restarts.after(health, time.monotonic(), self.pace)
            if following is None:
                raise EndpointFailed(_last_words(reason, restarts, lines))
            if health.status is Status.STARTING and not self.config.port:
                self._release()
            restarts = following
            self._pause(f"{reason}; it starts again in {restarts.delay(self.pace):g} s", restarts)

    def stop(self, *_: object) -> None:
        """Leave as soon as the requests that run are answered: a handler for signals."""
        self._signalled = True

    def _live(self, restarts: Restarts) -> tuple[Health, str, list[str]]:
        """One life of the engine: its last health, how it ended, the last lines that it wrote."""
        health = Health(began=time.monotonic())
        try:
            port = self._reserve().port
        except UnreachableError as error:
            return health, error.message, []
        engine = self._start(port)
        watch = Watch(Probe(_reachable(self.config.bind), port, self.key, self.config.name, self.pace))
        try:
            health, reason = self._follow(engine, watch, health, port, restarts)
            return health, reason, engine.last_lines(self.key)
        finally:
            watch.close()
            engine.kill()

    def _follow(
        self, engine: Engine, watch: Watch, health: Health, port: int, restarts: Restarts
    ) -> tuple[Health, str]:
        """Until the engine ends, hangs, or is to stop."""
        about = {"port": port, "engine_pid": engine.pid, "restarts": restarts.total}
        while True:
            self.board.publish(time.monotonic(), status=health.status, reason=health.reason, **about)
            if self._stopping():
                watch.close()
                self._drain(engine)
                return health, "the endpoint was stopped"
            if ended := engine.exited():
                return health, f"the engine {ended}"
            seen, now = watch.next(self.pace.poll), time.monotonic()
            health = health.after(seen, now, self.pace) if seen else health.at(now, self.pace)
            if health.dead:
                return health, f"the engine was killed: {health.dead}"

    def _start(self, port: int) -> Engine:
        arguments = command.command(self.config, port, python=self.python, pace=self.pace)
        processors = sorted(os.sched_getaffinity(0))
        variables = command.environment(
            self.config, self.key, self.environment, cpu=command.on_cpu(), processors=processors
        )
        return Engine(arguments, variables, self.paths.engine_log)

    def _drain(self, engine: Engine) -> None:
        def tick() -> None:
            self.board.publish(time.monotonic(), status=Status.STOPPING, reason="it answers what it has begun")

        tick()
        engine.stop(self.pace.drain + self.pace.kill_after, tick=tick)

    def _reserve(self) -> Reservation:
        if self._reservation is None:
            self._reservation = Reservation(self.config.bind, self.config.port)
        return self._reservation

    def _release(self) -> None:
        if self._reservation:
            self._reservation.release()
            self._reservation = None

    def _pause(self, reason: str, restarts: Restarts) -> None:
        until = time.monotonic() + restarts.delay(self.pace)
        while time.monotonic() < until and not self._stopping():
            self.board.publish(time.monotonic(), status=Status.UNHEALTHY, reason=reason, engine_pid=None)
            time.sleep(min(self.pace.poll, max(0.0, until - time.monotonic())))

    def _stopping(self) -> bool:
        return self._signalled or self.paths.stop.exists()


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 after a stop, else 1 or that of the error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m tfslurm.serving.supervisor FOLDER, an endpoint's folder", file=sys.stderr)
        return UsageError.exit_code
    paths = EndpointPaths(Path(arguments[0]).resolve())
    pace = Pace.from_environment(os.environ)
    paths.logs.mkdir(exist_ok=True)
    paths.outcome.unlink(missing_ok=True)  # An earlier attempt's.
    board = Board(paths.state, "127.0.0.1", os.environ, heartbeat=pace.heartbeat)
    try:
        config = read_config(paths.config)
        board = Board(paths.state, config.bind, os.environ, heartbeat=pace.heartbeat)
        supervise(paths, config, pace, board)
    except TfslurmError as error:
        board.publish(time.monotonic(), status=Status.ERROR, reason=str(error), engine_pid=None)
        write_json(paths.outcome, {"result": "failed", "error": str(error)})
        print(error, file=sys.stderr)
        return error.exit_code
    board.publish(time.monotonic(), status=Status.STOPPED, reason=None, engine_pid=None)
    write_json(paths.outcome, {"result": "stopped"})
    return 0


def supervise(paths: EndpointPaths, config: ServingConfig, pace: Pace, board: Board) -> None:
    """Returns when the endpoint was stopped; raises a TfslurmError where it cannot run."""
    if config.start_timeout is not None:
        pace = msgspec.structs.replace(pace, start_timeout=config.start_timeout)
    supervisor = Supervisor(paths, config, read_key(paths.key), pace, board, os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.stop)
    board.publish(time.monotonic(), reason="the checkpoint is being verified")
    verify_folder(Path(config.checkpoint.path), config.checkpoint.digest)
    Path(config.cache).mkdir(parents=True, exist_ok=True)
    supervisor.run()


def read_config(path: Path) -> ServingConfig:
    try:
        return ServingConfig.read(path)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path}: {error}.") from error


def _reachable(bind: str) -> str:
    """Where this node reaches what is bound there."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(bind, bind)


def _last_words(reason: str, restarts: Restarts, lines: list[str]) -> str:
    again = f" and again after {restarts.in_a_row} restarts" if restarts.in_a_row else ""
    said = ["The last lines that it wrote:", *(f"  {line}" for line in lines)] if lines else []
    return "\n".join([f"{reason[0].upper()}{reason[1:]}{again}.", *said])


if __name__ == "__main__":
    sys.exit(main())
