"""An ASGI middleware inside vLLM's server: nothing but /health answers without the key.

vLLM's own check covers the routes below /v1 and a few more; /invocations, a full inference route, /tokenize, /metrics
and others stay open. https://docs.vllm.ai/en/latest/usage/security.html
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Callable, Send], Awaitable[None]]

OPEN = frozenset({"/health"})

REFUSAL = b'{"error": {"message": "a valid API key is required", "type": "invalid_request_error", "code": 401}}'


class Guard:
    """Lets a request through to `app` where it carries `Authorization: Bearer KEY`; else answers 401."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Callable, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN or self._permitted(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _permitted(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self.expected)
