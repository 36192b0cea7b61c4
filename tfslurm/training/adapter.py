"""Save a trained adapter in PEFT's own format, and make sure that it is one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from tfslurm.errors import InvalidError
from tfslurm.files import fsync_folder, write_atomic, write_json
from tfslurm.training.batches import MicroBatch
from tfslurm.training.config import TrainingConfig
from tfslurm.training.loss import SupervisedLoss
from tfslurm.training.model import MAX_RANK, load_base
from tfslurm.training.model_card import base_name, model_card
from tfslurm.training.outcome import AdapterSummary, FileEntry

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*")
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}
"""How far a reloaded adapter's log-probabilities may lie from the trained model's, in nats, on average."""


def write_adapter(
    folder: Path, model: PeftModel, tensors: dict[str, torch.Tensor], config: TrainingConfig, *, steps: int, loss: float
) -> None:
    """Write weights, configuration, tokenizer files and model card into `folder`.

    `tensors` are the model's trainable parameters by name, gathered on the CPU. Embeddings are
    left out, and nothing names a path of this installation.
    """
    model.peft_config["default"].base_model_name_or_path = base_name(config)
    model.save_pretrained(folder, state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
    _sort_lists(folder / CONFIG)
    write_atomic(folder / "README.md", model_card(config, steps=steps, loss=loss))
    base = Path(config.base_model.path)
    for path in sorted({path for pattern in TOKENIZER for path in base.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def verify_files(folder: Path, modules: Iterable[str], rank: int) -> AdapterSummary:
    """Check the adapter on disk, and summarize it.

    `modules` are the full names of the linear layers that were to be adapted. Raises InvalidError
    unless every one of them, and nothing else, has its two matrices of the right rank, finite and
    not empty, something was learned, and vLLM can serve the rank.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InvalidError(f"the saved adapter cannot be read: {error}") from error
    modules = list(modules)
    _check_names(set(tensors), modules)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, rank)
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise InvalidError(
            "the adapter did not change: every lora_B is zero",
            hint="raise the learning rate, or train for more steps",
        )
    if not 1 <= rank <= MAX_RANK:
        raise InvalidError(f"LoRA rank {rank} cannot be served: it is not in 1 to {MAX_RANK}")
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    return AdapterSummary(lora_rank=rank, target_modules=leaves, files=_file_entries(folder))


def verify_effect(folder: Path, config: TrainingConfig, probe: MicroBatch, trained: torch.Tensor) -> None:
    """Reload base and adapter with PEFT, and compare log-probabilities on a training row.

    `trained` are those of the model as it was trained, [supervised]. Raises InvalidError where the
    adapter changes nothing, or where it is not what was trained.
    """
    base = load_base(config).to(probe.input_ids.device)
    model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    loss = SupervisedLoss(model, bounds_on_device=config.trainer.attention == "flash_attention_2")
    adapted = log_probabilities(loss, probe)
    with model.disable_adapter():
        plain = log_probabilities(loss, probe)
    if torch.equal(adapted, plain):
        raise InvalidError(
            "the saved adapter changes nothing: the base model gives a training row the same probabilities",
            hint="raise the learning rate, or train for more steps",
        )
    distance = (adapted - trained).abs().mean().item()
    if not distance <= TOLERANCE[config.trainer.dtype]:
        raise InvalidError(f"the saved adapter is not what was trained: log-probabilities differ by {distance:.3g}")


@torch.no_grad()
def log_probabilities(loss: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Of each supervised token of `batch`, fp32 [supervised]; `loss` is a SupervisedLoss or the engine around one."""
    return -loss(batch, reduction="none")


def publish(folder: Path, destination: Path) -> None:
    """Make `folder` appear as `destination`, in the place of an earlier attempt's."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)
    if destination.exists():
        shutil.rmtree(destination)
    os.rename(folder, destination)
    fsync_folder(destination.parent)


def temporary_folder(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=parent, prefix=".adapter."))


def _sort_lists(path: Path) -> None:
    """PEFT writes sets in no particular order; the same training must give the same bytes."""
    values = json.loads(path.read_bytes())
    write_json(path, {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()})


def _check_names(names: set[str], modules: list[str]) -> None:
    wanted = {f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"}
    missing, surplus = sorted(wanted - names), sorted(names - wanted)
    if missing:
        raise InvalidError(f"the saved adapter lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}")
    if surplus:
        raise InvalidError(f"the saved adapter has {len(surplus)} tensors too many, such as {surplus[0]}")


def _check_tensor(name: str, tensor: torch.Tensor, rank: int) -> None:
    found = tensor.shape[0 if ".lora_A." in name else 1] if tensor.ndim == 2 else None
    if found != rank or tensor.numel() == 0:
        raise InvalidError(f"{name} has the shape {list(tensor.shape)}, which is not of rank {rank}")
    if not torch.isfinite(tensor).all():
        raise InvalidError(f"{name} holds values that are not finite", hint="lower the learning rate")


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    return {path.name: _file_entry(path) for path in sorted(folder.iterdir())}


def _file_entry(path: Path) -> FileEntry:
    with open(path, "rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
