from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
import pytest
from served_endpoint import KEY, Endpoint

from tfslurm.files import read_json
from tfslurm.serving.config import ServingConfig
from tfslurm.serving.ports import Reservation
from tfslurm.serving.state import address, attempt

Steer = Callable[..., None]
Starts = Callable[[], list[list[int]]]


@pytest.fixture
def healthy(endpoint: Endpoint, config: ServingConfig) -> Endpoint:
    endpoint.write(config)
    endpoint.start()
    endpoint.wait_until("healthy")
    return endpoint


def gone(endpoint: Endpoint) -> bool:
    """Whether no process of an engine is left, after a moment's grace."""
    deadline = time.monotonic() + 5
    while endpoint.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not endpoint.left()


def test_a_healthy_endpoint_says_where_it_is(healthy: Endpoint, starts: Starts) -> None:
    state = healthy.state
    [[engine_pid, port]] = starts()
    assert healthy.process
    assert state["url"] == f"http://127.0.0.1:{port}/v1"
    assert (state["address"], state["port"]) == ("127.0.0.1", port)
    assert (state["pid"], state["engine_pid"]) == (healthy.process.pid, engine_pid)
    assert (state["attempt"], state["restarts"], state["reason"]) == (0, 0, None)
    assert datetime.fromisoformat(state["since"]) <= datetime.fromisoformat(state["at"])


def test_the_state_is_written_again_at_every_heartbeat(healthy: Endpoint) -> None:
    written = healthy.paths.state.stat().st_mtime_ns
    time.sleep(0.5)
    assert healthy.paths.state.stat().st_mtime_ns > written
    assert healthy.state["status"] == "healthy"


def test_the_key_is_in_no_argument_and_no_file_but_its_own(healthy: Endpoint) -> None:
    for process in (healthy.state["pid"], *healthy.left()):
        assert KEY.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
    holding = [path for path in healthy.paths.folder.rglob("*") if path.is_file() and KEY in path.read_text()]
    assert holding == [healthy.paths.key]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "file"])
def test_a_stop_ends_the_engine_and_says_so(healthy: Endpoint, how: str) -> None:
    assert healthy.process
    if how == "file":
        healthy.paths.stop.touch()
    else:
        healthy.process.send_signal(signal.Signals[how])
    assert healthy.exit_code() == 0
    assert healthy.left() == []
    assert healthy.state["status"] == "stopped"
    assert read_json(healthy.paths.outcome) == {"result": "stopped"}


def test_an_engine_that_ignores_the_stop_is_killed(endpoint: Endpoint, config: ServingConfig, engine: Steer) -> None:
    engine(start="deaf")
    endpoint.write(config)
    endpoint.start()
    endpoint.wait_until("healthy")
    began = time.monotonic()
    endpoint.paths.stop.touch()
    endpoint.wait_until("stopping")
    assert endpoint.exit_code() == 0
    assert 1.5 <= time.monotonic() - began < 4
    assert endpoint.left() == []
    assert endpoint.state["status"] == "stopped"


def test_a_killed_engine_comes_back_at_the_same_port(healthy: Endpoint, starts: Starts) -> None:
    before = healthy.state
    os.kill(before["engine_pid"], signal.SIGKILL)
    state = healthy.wait_for(lambda state: state["restarts"] == 1 and state["status"] == "healthy")
    assert state["url"] == before["url"]
    assert state["engine_pid"] != before["engine_pid"]
    assert len(starts()) == 2
    healthy.groups = {before["engine_pid"]}
    assert gone(healthy)  # Its child too, which outlives a kill -9 of its parent.


def test_an_engine_that_exits_by_itself_is_a_failure_too(healthy: Endpoint) -> None:
    os.kill(healthy.state["engine_pid"], signal.SIGTERM)
    state = healthy.wait_for(lambda state: state["status"] == "unhealthy")
    assert state["reason"].startswith("the engine exited with code 0; it starts again in")
    healthy.wait_for(lambda state: state["restarts"] == 1 and state["status"] == "healthy")


def test_a_stopped_engine_is_found_and_replaced(healthy: Endpoint) -> None:
    hung = healthy.state["engine_pid"]
    os.kill(hung, signal.SIGSTOP)
    healthy.wait_until("unhealthy")
    state = healthy.wait_for(lambda state: state["restarts"] == 1 and state["status"] == "healthy")
    assert state["engine_pid"] != hung
    assert not Path(f"/proc/{hung}").exists()


def test_an_engine_that_answers_health_but_no_completion_is_replaced(
    healthy: Endpoint, engine: Steer, starts: Starts
) -> None:
    engine(mode="silent")
    healthy.wait_until("unhealthy")
    healthy.wait_for(lambda state: state["restarts"] == 1)
    engine(mode="ok")
    healthy.wait_until("healthy")
    assert len(starts()) == 2


def test_a_busy_engine_is_left_alone(healthy: Endpoint, engine: Steer, starts: Starts) -> None:
    engine(mode="busy")
    state = healthy.wait_for(lambda state: state["reason"])
    assert state["reason"].startswith("busy: /v1/completions was not answered")
    time.sleep(1.5)  # Longer than three probes take.
    assert (healthy.state["status"], len(starts())) == ("healthy", 1)
    engine(mode="ok")
    healthy.wait_for(lambda state: state["status"] == "healthy" and not state["reason"])


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("refusing", "/v1/completions answered 401"), ("bare", "the adapter 'helpdesk' is not among its models")],
)
def test_an_engine_that_refuses_the_probe_never_gets_healthy(
    endpoint: Endpoint, config: ServingConfig, engine: Steer, mode: str, reason: str
) -> None:
    engine(mode=mode)
    endpoint.write(config)
    endpoint.start()
    state = endpoint.wait_for(lambda state: state.get("reason") and reason in state["reason"])
    assert state["status"] == "starting"
    engine(mode="ok")
    assert endpoint.wait_until("healthy")["restarts"] == 0


def test_the_site_s_time_limit_for_a_start_is_the_one_that_counts(
    endpoint: Endpoint, config: ServingConfig, engine: Steer
) -> None:
    engine(mode="refusing")
    endpoint.write(msgspec.structs.replace(config, start_timeout=0.7))
    endpoint.start()
    endpoint.wait_until("error")
    assert "it was not ready 0.7 s after its start" in endpoint.state["reason"]


def test_it_gives_up_with_the_engine_s_last_lines(
    endpoint: Endpoint, config: ServingConfig, engine: Steer, starts: Starts
) -> None:
    engine(start="broken")
    endpoint.write(config)
    endpoint.start()
    assert endpoint.exit_code() == 1
    assert len(starts()) == 2
    state, outcome = endpoint.state, read_json(endpoint.paths.outcome)
    assert state["status"] == "error"
    assert outcome == {"result": "failed", "error": state["reason"]}
    assert outcome["error"].splitlines() == [
        "The engine exited with code 1 and again after 1 restarts.",
        "The last lines that it wrote:",
        "  ValueError: no kernel for this quantization, key ***",
    ]


def test_restarts_after_healthy_times_are_bounded_too(healthy: Endpoint, engine: Steer, starts: Starts) -> None:
    engine(start="broken")
    os.kill(healthy.state["engine_pid"], signal.SIGKILL)
    assert healthy.exit_code() == 1
    assert len(starts()) == 3
    assert healthy.state["status"] == "error"
    assert gone(healthy)


def test_a_start_that_loses_its_port_gets_another(
    endpoint: Endpoint, config: ServingConfig, engine: Steer, starts: Starts
) -> None:
    engine(start="taken-once")
    endpoint.write(config)
    endpoint.start()
    state = endpoint.wait_until("healthy")
    [[_, lost], [_, taken]] = starts()
    assert lost != taken == state["port"]


def test_a_fixed_port_is_used(endpoint: Endpoint, config: ServingConfig) -> None:
    with Reservation("127.0.0.1") as free:
        port = free.port
    endpoint.write(msgspec.structs.replace(config, port=port))
    endpoint.start()
    assert endpoint.wait_until("healthy")["url"] == f"http://127.0.0.1:{port}/v1"


def test_a_fixed_port_that_stays_taken_ends_in_error(endpoint: Endpoint, config: ServingConfig) -> None:
    with Reservation("127.0.0.1") as taken:
        taken._socket.listen()
        endpoint.write(msgspec.structs.replace(config, port=taken.port))
        endpoint.start()
        assert endpoint.exit_code() == 1
    assert f"Port {taken.port} of 127.0.0.1 cannot be bound: Address already in use" in endpoint.state["reason"]


def test_nothing_outlives_a_kill_of_the_supervisor(healthy: Endpoint) -> None:
    assert healthy.left() and healthy.process
    healthy.process.kill()
    assert gone(healthy)


def test_a_key_that_others_may_read_is_refused(endpoint: Endpoint, config: ServingConfig) -> None:
    endpoint.write(config)
    endpoint.paths.key.chmod(0o640)
    endpoint.start()
    assert endpoint.exit_code() == 6
    assert stat.S_IMODE(endpoint.paths.key.stat().st_mode) == 0o640
    assert "others may read the key (mode 0640)" in read_json(endpoint.paths.outcome)["error"]


def test_a_checkpoint_whose_bytes_changed_is_not_served(
    endpoint: Endpoint, config: ServingConfig, tmp_path: Path
) -> None:
    endpoint.write(config)
    (Path(config.checkpoint.path) / "adapter_model.safetensors").write_bytes(b"wEights")
    endpoint.start()
    assert endpoint.exit_code() == 5
    assert "adapter_model.safetensors: its bytes have changed" in endpoint.state["reason"]
    assert not (tmp_path / "engine" / "starts").exists()


def test_a_configuration_that_is_not_one_is_named(endpoint: Endpoint, config: ServingConfig) -> None:
    endpoint.write(config)
    endpoint.paths.config.write_text('{"name": "x"}')
    endpoint.start()
    assert endpoint.exit_code() == 5
    assert str(endpoint.paths.config) in endpoint.state["reason"]


def test_the_outcome_of_an_earlier_attempt_is_removed(endpoint: Endpoint, config: ServingConfig) -> None:
    endpoint.write(config)
    endpoint.paths.outcome.write_text('{"result": "failed", "error": "earlier"}')
    endpoint.start()
    endpoint.wait_until("healthy")
    assert not endpoint.paths.outcome.exists()


def test_attempt_and_address_come_from_slurm_and_the_site() -> None:
    assert attempt({"SLURM_RESTART_COUNT": "3", "TFSLURM_ATTEMPT": "9"}) == 3
    assert attempt({"TFSLURM_ATTEMPT": "2"}) == 2
    assert address("0.0.0.0", {"TFSLURM_NODE_ADDRESS": "10.0.0.7"}) == "10.0.0.7"
    assert address("127.0.0.1", {}) == "127.0.0.1"
    assert address("0.0.0.0", {}) == os.uname().nodename
