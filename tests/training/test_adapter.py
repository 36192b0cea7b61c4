from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tfslurm.errors import InvalidError
from tfslurm.training.adapter import WEIGHTS, publish, verify_files

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


def tensors(rank=4):
    made = {}
    for module in MODULES:
        made[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 8)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.ones(16, rank)
    return made


def refused(folder, made, match, rank=4):
    save_file(made, folder / WEIGHTS)
    with pytest.raises(InvalidError, match=match):
        verify_files(folder, MODULES, rank)


def test_a_whole_adapter_is_summarized_with_its_files(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS)
    summary = verify_files(tmp_path, MODULES, 4)
    assert summary.target_modules == ["q_proj", "up_proj"] and summary.lora_rank == 4
    assert summary.files[WEIGHTS].size == (tmp_path / WEIGHTS).stat().st_size
    assert len(summary.files[WEIGHTS].sha256) == 64


def test_an_adapter_that_learned_nothing_is_refused(tmp_path):
    made = {name: value * (0 if ".lora_B." in name else 1) for name, value in tensors().items()}
    refused(tmp_path, made, "did not change")


def test_values_that_are_not_finite_are_refused(tmp_path):
    made = tensors()
    next(iter(made.values()))[0, 0] = float("nan")
    refused(tmp_path, made, "not finite")


def test_an_empty_tensor_is_refused(tmp_path):
    made = tensors()
    made[next(iter(made))] = torch.ones(0)
    refused(tmp_path, made, "not of rank 4")


def test_a_missing_module_and_one_too_many_are_refused(tmp_path):
    made = tensors()
    made.pop(next(iter(made)))
    refused(tmp_path, made, "lacks 1 of 4")
    refused(tmp_path, tensors() | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 8)}, "1 tensors too many")


def test_another_rank_than_the_jobs_is_refused(tmp_path):
    refused(tmp_path, tensors(rank=8), "not of rank 4")


def test_a_file_cut_short_is_refused(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:40])
    with pytest.raises(InvalidError, match="cannot be read"):
        verify_files(tmp_path, MODULES, 4)


def test_publishing_replaces_an_earlier_attempts_adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / WEIGHTS).touch()
    publish(tmp_path / ".new", tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
