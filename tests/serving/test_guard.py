"""The middleware that asks for the key, with the ASGI server played by the test."""

from __future__ import annotations

import asyncio

import pytest

from tfslurm.serving.guard import Guard

KEY = "tfs-secret"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return Guard(app)


def answer(guard: Guard, path: str, key: str | None = None, kind: str = "http") -> dict:
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key is not None else []
    asyncio.run(guard({"type": kind, "path": path, "headers": headers}, None, send))
    return sent[0]


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/health/../invocations", "/HEALTH", ""])
@pytest.mark.parametrize("key", [None, "", "tfs-secre", "tfs-secret2"])
def test_nothing_answers_without_the_right_key(guard: Guard, path: str, key: str | None) -> None:
    assert answer(guard, path, key)["status"] == 401


def test_the_right_key_opens_every_route(guard: Guard) -> None:
    assert answer(guard, "/invocations", KEY)["status"] == 200


def test_health_needs_no_key(guard: Guard) -> None:
    assert answer(guard, "/health")["status"] == 200


def test_a_websocket_without_the_key_is_closed(guard: Guard) -> None:
    assert answer(guard, "/v1/realtime", kind="websocket") == {"type": "websocket.close", "code": 1008}
