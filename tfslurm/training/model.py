"""Load the base model and put LoRA adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tfslurm.errors import InvalidError
from tfslurm.training.attention import NAME as SEGMENTS
from tfslurm.training.attention import supports_segments
from tfslurm.training.config import TrainingConfig

MAX_RANK = 512
"""The largest `max_lora_rank` that vLLM takes."""


def quieten() -> None:
    """A log is no terminal: leave progress bars out of it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_base(config: TrainingConfig, *, attention: str | None = None) -> PreTrainedModel:
    """The base model in the configured dtype, offline, its weights frozen.

    `attention` None asks for the one that training uses. Raises InvalidError where transformers
    cannot load the folder as a causal language model.
    """
    folder = Path(config.base_model.path)
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=described,
            dtype=getattr(torch, config.trainer.dtype),
            attn_implementation=attention or training_attention(config, described),
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InvalidError(f"base model {config.base_model.name} in {folder} does not load: {error}") from error
    return model.requires_grad_(False)


def training_attention(config: TrainingConfig, described) -> str:
    """Flash attention knows segments by itself; SDPA is given them one by one.

    A model whose attention SDPA cannot express runs eagerly, where transformers masks the segments.
    """
    if config.trainer.attention != "sdpa":
        return config.trainer.attention
    return SEGMENTS if supports_segments(described) else "eager"


def add_lora(model: PreTrainedModel, config: TrainingConfig) -> PeftModel:
    """LoRA on every linear layer but the head. Raises InvalidError for a rank that vLLM could not serve."""
    hyperparameters = config.hyperparameters
    if not 1 <= hyperparameters.lora_rank <= MAX_RANK:
        raise InvalidError(f"LoRA rank {hyperparameters.lora_rank} is not in 1 to {MAX_RANK}, which can be served")
    lora = LoraConfig(
        r=hyperparameters.lora_rank,
        lora_alpha=hyperparameters.lora_alpha,
        lora_dropout=config.trainer.lora_dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    if config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, lora)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The full names of the layers that `add_lora` is to adapt."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]


def gather_trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, whole and on the CPU; under ZeRO-3 every process must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(trainable(model)):
        return {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}


def zero3_context(config: TrainingConfig, deepspeed: dict[str, Any]):
    """What must stay alive while a model is loaded in partitions (ZeRO stage 3); None in other stages."""
    if config.trainer.zero_stage < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
