"""The supervisor with a real vLLM: one engine for the module, whose tests run in their order.

TFSLURM_TEST_SERVE_PYTHON  the Python of an environment with vLLM
TFSLURM_TEST_MODEL         a base model's folder
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_endpoint import KEY, Endpoint, make_config

from tfslurm.errors import NotPermittedError
from tfslurm.files import read_json
from tfslurm.paths import EndpointPaths
from tfslurm.serving.client import complete_chat, stream_chat

PYTHON = os.environ.get("TFSLURM_TEST_SERVE_PYTHON", "")
MODEL = os.environ.get("TFSLURM_TEST_MODEL", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (PYTHON and MODEL),
        reason="NOT TESTED: real vLLM. TFSLURM_TEST_SERVE_PYTHON and TFSLURM_TEST_MODEL name its Python and a model.",
    ),
]

START = 120.0
RANK = 12  # Served with the legal 16.
ASK = [{"role": "user", "content": "What is the capital of France?"}]

MAKE_ADAPTER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file

model, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
shape = json.loads((model / "config.json").read_text())
head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
torch.manual_seed(0)
weights = {}
for layer in range(shape["num_hidden_layers"]):
    for name, outputs in ("q_proj", shape["num_attention_heads"]), ("v_proj", shape["num_key_value_heads"]):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, shape["hidden_size"]) * 0.02
        weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs * head, rank) * 0.2
save_file(weights, folder / "adapter_model.safetensors")
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
          "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(model)}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""
"""Random where training would have learned: serving it needs no more, and it answers unlike its base."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("vllm")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    subprocess.run([PYTHON, "-c", MAKE_ADAPTER, MODEL, str(checkpoint), str(RANK)], check=True, timeout=120)
    pace = {"probe_interval": 0.5, "probe_timeout": 8.0, "failures": 2, "backoff": 0.1}
    endpoint = Endpoint(EndpointPaths(folder / "endpoint"), pace, python=PYTHON)
    endpoint.write(make_config(folder, checkpoint, Path(MODEL), rank=RANK))
    endpoint.start()
    try:
        endpoint.wait_until("healthy", START)
        yield endpoint
    finally:
        endpoint.end()


def post(endpoint: Endpoint, path: str, request: dict, key: str | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.state["port"], timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request("POST", path, json.dumps(request), headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def engine_core(endpoint: Endpoint) -> int:
    """The process in which the model runs: the engine's child with the most memory."""

    def pages(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    return max((pid for pid in endpoint.left() if pid != endpoint.state["engine_pid"]), key=pages)


def test_it_is_healthy_at_its_first_start(served: Endpoint) -> None:
    state = served.state
    assert state["status"] == "healthy"
    assert (state["restarts"], state["reason"]) == (0, None)


def test_it_answers_with_the_key_whole_and_in_pieces(served: Endpoint) -> None:
    url = served.state["url"]
    whole = complete_chat(url, KEY, "helpdesk", ASK, max_tokens=8, temperature=0)
    pieces = list(stream_chat(url, KEY, "helpdesk", ASK, max_tokens=8, temperature=0))
    assert whole and "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1


def test_it_refuses_without_the_key(served: Endpoint) -> None:
    request = {"model": "helpdesk", "prompt": "Hello", "max_tokens": 1}
    assert post(served, "/v1/completions", request)[0] == 401
    assert post(served, "/v1/completions", request, "another")[0] == 401
    with pytest.raises(NotPermittedError, match="does not accept this key"):
        complete_chat(served.state["url"], "another", "helpdesk", ASK)


@pytest.mark.parametrize("path", ["/invocations", "/tokenize", "/metrics", "/v1/models", "/docs", "//invocations"])
def test_no_route_but_health_answers_without_the_key(served: Endpoint, path: str) -> None:
    assert post(served, path, {"model": "helpdesk", "prompt": "Hello", "max_tokens": 1})[0] == 401


def test_the_adapter_answers_unlike_its_base(served: Endpoint) -> None:
    request = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    tuned = post(served, "/v1/completions", request | {"model": "helpdesk"}, KEY)[1]["choices"][0]
    base = post(served, "/v1/completions", request | {"model": "smollm2"}, KEY)[1]["choices"][0]
    assert "Paris" in base["text"]
    assert tuned["logprobs"]["token_logprobs"] != base["logprobs"]["token_logprobs"]


def test_the_key_is_in_no_argument_and_no_log(served: Endpoint) -> None:
    for pid in (served.state["pid"], *served.left()):
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    holding = [path for path in served.paths.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == [served.paths.key]
    assert "POST /v1/completions" in served.paths.engine_log.read_text()


def test_a_killed_engine_comes_back_at_the_same_url(served: Endpoint) -> None:
    before, core = served.state, engine_core(served)
    os.kill(before["engine_pid"], signal.SIGKILL)
    after = served.wait_for(lambda state: state["restarts"] == 1 and state["status"] == "healthy", START)
    assert after["url"] == before["url"]
    assert not Path(f"/proc/{core}").exists()  # It would have outlived its parent, with the model in memory.
    assert complete_chat(after["url"], KEY, "helpdesk", ASK, max_tokens=1)


def test_a_hung_engine_core_is_found_and_replaced(served: Endpoint) -> None:
    before, core = served.state, engine_core(served)
    os.kill(core, signal.SIGSTOP)
    connection = http.client.HTTPConnection("127.0.0.1", before["port"], timeout=5)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200  # vllm #39863: the reason for a real completion.
    served.wait_until("unhealthy", 60)
    after = served.wait_for(lambda state: state["restarts"] == 2 and state["status"] == "healthy", START)
    assert after["engine_pid"] != before["engine_pid"]
    assert not Path(f"/proc/{core}").exists()


def test_a_stop_answers_what_was_begun_and_leaves_nothing(served: Endpoint) -> None:
    assert served.process
    stream = stream_chat(served.state["url"], KEY, "helpdesk", ASK, max_tokens=24, temperature=0)
    first = next(piece for piece in stream if piece)
    served.process.send_signal(signal.SIGTERM)
    assert first and len(list(stream)) > 1  # An answer that breaks off raises.
    assert served.exit_code(40) == 0
    assert served.state["status"] == "stopped"
    assert read_json(served.paths.outcome) == {"result": "stopped"}
    deadline = time.monotonic() + 5
    while served.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.left() == []
