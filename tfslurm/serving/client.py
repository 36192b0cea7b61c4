"""Ask an endpoint for an answer: what the command line needs of OpenAI's protocol, and no more.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from tfslurm.errors import InvalidError, NotFoundError, NotPermittedError, TfslurmError, UnreachableError

Messages = Sequence[dict[str, str]]
"""`[{"role": "user", "content": "…"}, …]`, the oldest first."""

# A site's web proxy does not know its own nodes, so the proxy variables are not for endpoints.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def complete_chat(
    url: str,
    key: str,
    model: str,
    messages: Messages,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    timeout: float = 300.0,
) -> str:
    """The whole answer. `url` is the base that ends in /v1; `timeout` holds for each wait, in seconds.

    Raises UnreachableError, NotPermittedError (the key), NotFoundError (the model) or
    InvalidError (the request, with the server's words).
    """
    with _post(url, key, _request(model, messages, max_tokens, temperature), timeout) as response:
        try:
            return json.loads(response.read())["choices"][0]["message"]["content"] or ""
        except (OSError, HTTPException) as error:
            raise _broken(url, error) from error
        except (ValueError, LookupError) as error:
            raise UnreachableError(f"{url} answered something that is not a chat completion.") from error


def stream_chat(
    url: str,
    key: str,
    model: str,
    messages: Messages,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    timeout: float = 300.0,
) -> Iterator[str]:
    """The answer in the pieces in which it comes; raises as `complete_chat` does.

    An answer that breaks off raises UnreachableError after the pieces that came.
    """
    request = _request(model, messages, max_tokens, temperature) | {"stream": True}
    with _post(url, key, request, timeout) as response:
        try:
            for event in _events(response):
                if "error" in event:
                    raise UnreachableError(f"{url} broke off: {_said(event)}")
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
        except (OSError, HTTPException) as error:
            raise _broken(url, error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise UnreachableError(f"{url} answered something that is not a stream of chat chunks.") from error


def example_request(url: str, model: str) -> str:
    """A curl command to paste; the key is read from $TFSLURM_KEY, so it shows in no history."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        f"curl {shlex.quote(url + '/chat/completions')} "
        '-H "Authorization: Bearer $TFSLURM_KEY" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _request(model: str, messages: Messages, max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    request = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
    return {name: value for name, value in request.items() if value is not None}


def _post(url: str, key: str, request: dict[str, Any], timeout: float) -> HTTPResponse:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/chat/completions", json.dumps(request).encode(), headers)
    try:
        return _direct.open(call, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error, str(request["model"])) from error
    except (OSError, HTTPException) as error:
        raise _broken(url, error) from error


def _refusal(url: str, error: urllib.error.HTTPError, model: str) -> TfslurmError:
    try:
        said = _said(json.loads(error.read()))
    except (OSError, HTTPException, ValueError):
        said = error.reason
    if error.code in (401, 403):
        return NotPermittedError(f"{url} does not accept this key.", hint="Each endpoint has a key of its own.")
    if error.code == 404:
        return NotFoundError(f"{url} does not serve {model!r}: {said}")
    if error.code < 500 and error.code != 429:
        return InvalidError(f"{url} refused the request: {said}")
    return UnreachableError(f"{url} cannot answer now ({error.code}): {said}")


def _broken(url: str, error: Exception) -> UnreachableError:
    if isinstance(error, TimeoutError):
        return UnreachableError(f"{url} did not answer in time.")
    why = error.reason if isinstance(error, urllib.error.URLError) else error
    return UnreachableError(f"{url} cannot be reached: {getattr(why, 'strerror', None) or why or type(why).__name__}.")


def _said(body: Any) -> str:
    """The message of an error in OpenAI's shape, or in FastAPI's."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to `[DONE]` (https://html.spec.whatwg.org/#server-sent-events)."""
    for line in response:
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            yield json.loads(data)
    raise HTTPException("the answer broke off")
