"""How much GPU memory a job needs, by formula, and the smallest instance that has it; needs no torch.

What each ZeRO stage spreads over the processes is after Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054;
activations are after Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, without the attention scores, which
fused kernels don't keep. For LoRA on Llama-2-7B at 8,192 tokens (rank 8 on attention, checkpointing, ZeRO-2, eight
GPUs) it gives 24.6 GB, where 25.7 GB were measured: https://arxiv.org/abs/2309.12307, table 12.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tfslurm.errors import InvalidError
from tfslurm.settings import Instance, Settings, Trainer
from tfslurm.training.config import Hyperparameters
from tfslurm.training.staging import read_config, shapes

RUNTIME = 3 * 2**30
"""CUDA's context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.08
"""What the allocator holds without being able to use it."""
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `adaptable` is the sum of inputs and outputs over the layers that LoRA adapts."""

    parameters: int
    adaptable: int
    hidden: int
    key_values: int
    feed_forward: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, by what they are for."""

    base: int
    adapter: int
    activations: int
    logits: int
    runtime: int
    fragmentation: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def describe(self) -> str:
        """`13.4 GiB base, …`, the largest first."""
        parts = sorted(asdict(self).items(), key=lambda part: -part[1])
        return ", ".join(f"{size / 2**30:.1f} GiB {name}" for name, size in parts)


@dataclass(frozen=True)
class Choice:
    """An instance, what a job needs on its GPUs, and what should be said of that.

    The estimate is None where there are no GPUs, or where the model's sizes are not known.
    """

    instance: Instance
    estimate: Estimate | None
    remark: str | None = None


def read_shape(folder: Path) -> Shape:
    """From config.json and the headers of the safetensors files. Raises InvalidError naming what is missing."""
    config = read_config(folder)
    text = config.get("text_config", config)
    weights = shapes(folder)
    hidden, layers = _size(text, folder, "hidden_size", "n_embd"), _size(text, folder, "num_hidden_layers", "n_layer")
    heads, vocabulary = _size(text, folder, "num_attention_heads", "n_head"), _size(text, folder, "vocab_size")
    width = text.get("head_dim") or hidden // heads
    return Shape(
        parameters=sum(math.prod(shape) for shape in weights.values()),
        adaptable=sum(sum(shape) for name, shape in weights.items() if _is_linear(name, shape, vocabulary)),
        hidden=hidden,
        key_values=(text.get("num_key_value_heads") or heads) * width,
        feed_forward=text.get("intermediate_size") or text.get("n_inner") or 4 * hidden,
        layers=layers,
        vocabulary=vocabulary,
    )


def _size(config: dict, folder: Path, *names: str) -> int:
    """Under the first of `names` that is there: GPT-2 and its kin have names of their own."""
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise InvalidError(f"{folder / 'config.json'} has no {names[0]}")


def _is_linear(name: str, shape: list[int], vocabulary: int) -> bool:
    """A layer that LoRA adapts: a matrix that is neither an embedding nor the head."""
    return len(shape) == 2 and vocabulary not in shape and "embed" not in name and not name.endswith(".wpe.weight")


def estimate(folder: Path, hyperparameters: Hyperparameters, trainer: Trainer, world_size: int) -> Estimate:
    """What a job on the staged model in `folder` needs on each of `world_size` GPUs. Raises InvalidError."""
    return estimate_for(read_shape(folder), hyperparameters, trainer, world_size)


def estimate_for(shape: Shape, hyperparameters: Hyperparameters, trainer: Trainer, world_size: int) -> Estimate:
    """The formula. A row longer than a micro-batch is one by itself, so the longer of the two counts."""
    width = 2 if trainer.dtype == "bfloat16" else 4
    tokens = max(trainer.micro_batch_tokens, hyperparameters.max_seq_length)
    parts = {
        "base": width * shape.parameters // (world_size if trainer.zero_stage == 3 else 1),
        "adapter": _adapter(hyperparameters.lora_rank * shape.adaptable, trainer.zero_stage, world_size),
        "activations": tokens * _activations(shape, trainer.gradient_checkpointing) * width // 2,
        "logits": tokens * shape.vocabulary * (width + 8),
        "runtime": RUNTIME,
    }
    return Estimate(**parts, fragmentation=int(FRAGMENTATION * sum(parts.values())))


def _adapter(parameters: int, stage: int, world_size: int) -> int:
    """Weights 2, gradients 2 and 4 where they are summed, fp32 masters 4, Adam's moments 8 bytes a parameter.

    Stage 0 is run as 1, which spreads masters and moments; 2 spreads gradients too, 3 all.
    """
    spread = {0: 12, 1: 12, 2: 18, 3: 20}[stage]
    return parameters * (20 - spread) + parameters * spread // world_size


def _activations(shape: Shape, checkpointing: bool) -> int:
    """Bytes a token in bfloat16: every layer's, or every layer's input and one live layer."""
    layer = 12 * shape.hidden + 4 * shape.key_values + 8 * shape.feed_forward
    return 2 * shape.hidden * shape.layers + layer if checkpointing else shape.layers * layer


def gpu_memory(instance: Instance) -> int | None:
    """Bytes of each GPU; None where instances.yaml does not say, or there are no GPUs."""
    found = re.fullmatch(r"([0-9.]+)([MGT])", instance.gpu_memory or "")
    return int(float(found[1]) * UNITS[found[2]]) if found and instance.gpus_per_node else None


def fits(instance: Instance, needed: Estimate | None) -> bool | None:
    """Whether a job fits the instance's GPUs; None where what it needs or what they have is not known."""
    has = gpu_memory(instance)
    return None if has is None or needed is None else needed.total <= has


def choose(settings: Settings, name: str, folder: Path, hyperparameters: Hyperparameters) -> Choice:
    """The instance called `name`, or for `auto` the smallest that has the memory.

    An instance that is named is taken, with a remark where the job does not fit. Where `auto` meets one whose memory
    is not known, it takes that. Raises what `Settings.instance` raises, and InvalidError where nothing fits `auto`.
    """
    usable = settings.instances_for_auto("training") if name == "auto" else [settings.instance(name, "training")]
    try:
        shape = read_shape(folder)
    except InvalidError as error:
        remark = f"the GPU memory that this job needs is not known: {error.message}"
        return Choice(usable[0], None, remark if usable[0].gpus_per_node else None)
    choices = [_choice(instance, shape, hyperparameters, settings.site.training.trainer) for instance in usable]
    chosen = next((choice for choice in choices if fits(choice.instance, choice.estimate) is not False), None)
    if chosen is None and name == "auto":
        raise _nothing_fits(choices)
    return chosen or choices[0]


def _choice(instance: Instance, shape: Shape, hyperparameters: Hyperparameters, trainer: Trainer) -> Choice:
    if not instance.gpus_per_node:
        return Choice(instance, None)
    needed, has = estimate_for(shape, hyperparameters, trainer, instance.processes), gpu_memory(instance)
    remark = None
    if has is None:
        remark = f"whether this job fits '{instance.name}' is not known: instances.yaml gives it no gpu_memory"
    elif not fits(instance, needed):
        remark = f"this job may not fit '{instance.name}': {_numbers(needed, has)}"
    return Choice(instance, needed, remark)


def _numbers(needed: Estimate, has: int) -> str:
    return f"it needs about {needed.total / 2**30:.1f} GiB a GPU, of {has / 2**30:.1f} ({needed.describe()})"


def _nothing_fits(choices: list[Choice]) -> InvalidError:
    largest = max(choices, key=lambda choice: gpu_memory(choice.instance))
    numbers = _numbers(largest.estimate, gpu_memory(largest.instance))
    return InvalidError(
        f"this job fits no instance; on '{largest.instance.name}' {numbers}",
        hint="Lower --max-seq-length or --lora-rank, have the site set training.trainer.gradient_checkpointing or "
        "zero_stage 3, or name an --instance to try all the same.",
    )
