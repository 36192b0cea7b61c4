"""Ask an engine whether it works: the adapter, by a completion; its progress, by its counters."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass

from tfslurm.serving.health import Observation
from tfslurm.serving.pace import Pace

_ITERATIONS = re.compile(rb"^vllm:iteration_tokens_total_count(?:\{[^}]*\})? (\S+)", re.MULTILINE)


class Silence(Exception):
    """The engine did not answer in time."""


class Refusal(Exception):
    """The engine answered, but not with what it should, or there is no server."""


@dataclass(frozen=True)
class Probe:
    """Questions to one engine, over HTTP/1.1 with a time limit on each."""

    host: str
    port: int
    key: str
    model: str
    """The adapter's name."""
    pace: Pace

    def observe(self) -> Observation:
        """One look. vLLM's /health only reads a flag, and a hung engine answers 200 there
        (vllm #39863), so the verdict comes from a real completion on the adapter.

        An engine that leaves the completion unanswered but counted iterations meanwhile is busy.
        """
        before = self.iterations()
        try:
            self._check()
        except Refusal as refusal:
            return Observation(answered=False, reason=str(refusal))
        except Silence as silence:
            after = self.iterations()
            progressed = before is not None and after is not None and after > before
            return Observation(answered=False, progressed=progressed, reason=str(silence))
        return Observation(answered=True)

    def up(self) -> bool:
        """/health says 200: only then is a probe worth its time."""
        try:
            return self._ask("GET", "/health", timeout=self.pace.glance_timeout)[0] == 200
        except (Refusal, Silence):
            return False

    def iterations(self) -> float | None:
        """Steps of the engine since it started (`vllm:iteration_tokens_total_count`); None where unknown."""
        try:
            status, body = self._ask("GET", "/metrics", timeout=self.pace.glance_timeout)
        except (Refusal, Silence):
            return None
        counts = [float(value) for value in _ITERATIONS.findall(body)]
        return sum(counts) if status == 200 and counts else None

    def _check(self) -> None:
        body = self._answer("GET", "/health", timeout=self.pace.glance_timeout, parse=False)
        body = self._answer("GET", "/v1/models", timeout=self.pace.glance_timeout)
        listed = [model.get("id") for model in body.get("data", [])]
        if self.model not in listed:
            raise Refusal(f"the adapter {self.model!r} is not among its models ({', '.join(map(str, listed))})")
        request = {"model": self.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        body = self._answer("POST", "/v1/completions", request, timeout=self.pace.probe_timeout)
        if not body.get("choices"):
            raise Refusal("the completion came without a choice")

    def _answer(
        self, method: str, path: str, request: dict | None = None, *, timeout: float, parse: bool = True
    ) -> dict:
        status, body = self._ask(method, path, request, timeout=timeout)
        if status != 200:
            raise Refusal(f"{path} answered {status}: {body[:200].decode(errors='replace').strip()}")
        try:
            return json.loads(body) if parse else {}
        except ValueError:
            raise Refusal(f"{path} answered something that is not JSON") from None

    def _ask(self, method: str, path: str, request: dict | None = None, *, timeout: float) -> tuple[int, bytes]:
        """(status, body). The time limit holds for each wait on the socket, of which there are few."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, json.dumps(request) if request else None, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError:
            raise Silence(f"{path} was not answered in {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(f"{path}: {error or type(error).__name__}") from None
        finally:
            connection.close()
