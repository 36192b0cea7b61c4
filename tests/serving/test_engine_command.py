from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from tfslurm.errors import ConfigurationError
from tfslurm.serving import command
from tfslurm.serving.config import ServingConfig
from tfslurm.serving.pace import Pace


def arguments(config: ServingConfig, port: int = 8123) -> list[str]:
    return command.command(config, port, python="python", pace=Pace())


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


def changed(config: ServingConfig, **changes: object) -> ServingConfig:
    return msgspec.structs.replace(config, **changes)


@pytest.mark.parametrize(("rank", "legal"), [(1, 1), (2, 8), (8, 8), (12, 16), (33, 64), (300, 320), (512, 512)])
def test_a_rank_is_rounded_up_to_one_that_vllm_accepts(rank: int, legal: int) -> None:
    assert command.legal_rank(rank) == legal


def test_a_rank_above_all_legal_ones_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LoRA rank 513"):
        command.legal_rank(513)


def test_the_server_gets_base_adapter_and_limits(config: ServingConfig) -> None:
    words = arguments(changed(config, max_context=2048, tensor_parallel=2, quantization="fp8"))
    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(words, "--model") == config.base_model.path
    assert option(words, "--served-model-name") == "smollm2"
    assert json.loads(option(words, "--lora-modules")) == {
        "name": "helpdesk", "path": config.checkpoint.path, "base_model_name": "smollm2",
    }  # fmt: skip
    assert "--enable-lora" in words
    assert option(words, "--max-lora-rank") == "8"
    assert option(words, "--max-model-len") == "2048"
    assert option(words, "--tensor-parallel-size") == "2"
    assert option(words, "--quantization") == "fp8"
    assert option(words, "--generation-config") == "vllm"
    assert (option(words, "--host"), option(words, "--port")) == ("127.0.0.1", "8123")


def test_no_quantization_leaves_the_option_out(config: ServingConfig) -> None:
    assert "--quantization" not in arguments(config)


def test_the_template_of_the_training_is_passed_on(config: ServingConfig) -> None:
    assert "--chat-template" not in arguments(config)
    template = Path(config.checkpoint.path) / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert option(arguments(config), "--chat-template") == str(template)


def test_without_a_template_file_the_tokenizer_of_the_training_is_used(config: ServingConfig) -> None:
    (Path(config.checkpoint.path) / "tokenizer_config.json").write_text("{}")
    assert option(arguments(config), "--tokenizer") == config.checkpoint.path


def test_engine_options_become_flags(config: ServingConfig) -> None:
    options = {"enforce-eager": True, "enable_prefix_caching": False, "max-num-seqs": 4, "generation-config": "auto"}
    words = arguments(changed(config, engine_options=options))
    assert "--enforce-eager" in words
    assert "--no-enable-prefix-caching" in words
    assert option(words, "--max-num-seqs") == "4"
    assert words.count("--generation-config") == 1
    assert option(words, "--generation-config") == "auto"


@pytest.mark.parametrize("name", ["api-key", "api_key", "--port", "lora-modules"])
def test_engine_options_cannot_take_over_what_the_endpoint_decides(config: ServingConfig, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is set by the endpoint itself"):
        arguments(changed(config, engine_options={name: "x"}))


def test_an_endpoint_named_like_its_base_model_is_refused(config: ServingConfig) -> None:
    with pytest.raises(ConfigurationError, match="has its base model's name"):
        arguments(changed(config, name="smollm2"))


def test_the_key_is_in_the_environment_and_not_in_the_arguments(config: ServingConfig) -> None:
    variables = command.environment(config, "secret", {"PATH": "/bin"}, cpu=False, processors=[0])
    assert variables["VLLM_API_KEY"] == "secret"
    assert variables["PATH"] == "/bin"
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables
    assert not any("secret" in word for word in arguments(config))


def test_on_a_cpu_the_model_runs_in_the_engine_s_own_process(config: ServingConfig) -> None:
    variables = command.environment(changed(config, threads=8), "k", {}, cpu=True, processors=[2, 3])
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["OMP_WAIT_POLICY"] == "passive"
    assert variables["TORCH_COMPILE_DISABLE"] == "1"


def test_on_cpus_each_rank_is_bound_to_its_own(config: ServingConfig) -> None:
    sharded = changed(config, threads=4, tensor_parallel=2)
    variables = command.environment(sharded, "k", {}, cpu=True, processors=[0, 1, 4, 5])
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|4,5"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in variables


def test_the_key_value_cache_follows_the_model_s_shape(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert command.kv_cache_gib(tmp_path, 8192) == 8  # 128 KiB a token
    assert command.kv_cache_gib(tmp_path, 512) == 1
    assert command.kv_cache_gib(tmp_path / "elsewhere", 512) == 4


def test_a_site_s_own_cache_size_wins(config: ServingConfig) -> None:
    variables = command.environment(config, "k", {"VLLM_CPU_KVCACHE_SPACE": "7"}, cpu=True, processors=[0])
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_the_pace_is_changed_by_the_environment() -> None:
    assert Pace.from_environment({"TFSLURM_SERVING_PACE": '{"drain": 120}'}) == Pace(drain=120)
    assert Pace.from_environment({}) == Pace()
    with pytest.raises(ConfigurationError, match="TFSLURM_SERVING_PACE.*dran"):
        Pace.from_environment({"TFSLURM_SERVING_PACE": '{"dran": 120}'})
