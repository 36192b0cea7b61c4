"""`checkpoint export --merged`: base and adapter as one model, checked by its log-probabilities."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_model
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import sha256_file
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import BaseModel, now
from tfslurm.errors import InvalidError
from tfslurm.training import merging
from tfslurm.training.export import TEMPORARY, Question
from tfslurm.training.outcome import AdapterSummary, FileEntry, Succeeded

WEIGHTS = "adapter_model.safetensors"


def save_adapter(base, folder, strength=0.05):
    """A LoRA adapter of rank 4 on every linear layer that changes something, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=strength)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


@pytest.fixture
def merge(tmp_path):
    """Merge an adapter into the model in a folder: (the agreement, the merged model's folder)."""

    def merge(base, **options):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        if not adapter.exists():
            save_adapter(base, adapter, **options)
        merged.mkdir()
        return merging.merge(Question(base=str(base), adapter=str(adapter), destination=str(merged))), merged

    return merge


@pytest.fixture
def bfloat16(tmp_path, tiny):
    folder = tmp_path / "bf16"
    shutil.copytree(tiny, folder)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model.float().eval()(input_ids=ids).logits


def test_an_fp32_model_is_merged_to_the_last_digits_and_loads_with_plain_transformers(merge, tiny, tmp_path):
    agreement, folder = merge(tiny)
    assert (agreement.dtype, agreement.tolerance) == ("float32", 1e-3)
    assert agreement.distance < 1e-5 < 0.1 < agreement.effect
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_model.CHATML
    ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
    assert torch.allclose(logits(merged, ids), logits(adapted, ids), atol=1e-4)


def test_a_bfloat16_model_stays_one_and_differs_by_the_rounding_alone(merge, bfloat16):
    agreement, folder = merge(bfloat16)
    assert agreement.dtype == "bfloat16" and agreement.distance < agreement.tolerance / 2 < agreement.effect
    old, new = load_file(bfloat16 / "model.safetensors"), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys()
    assert {value.dtype for value in new.values()} == {torch.bfloat16}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "_proj." in name}


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma", "phi3"])
def test_other_families_are_merged_into_shards_that_fit_together(merge, tmp_path, monkeypatch, family):
    base = tmp_path / family
    tiny_model.save_tokenizer(base, tiny_model.CHATML)
    tiny_model.save_model(base, family=family)
    monkeypatch.setattr(merging, "SHARD", "50KB")
    agreement, folder = merge(base)
    assert agreement.distance < 1e-4 < agreement.effect
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert len(set(index["weight_map"].values())) > 1
    AutoModelForCausalLM.from_pretrained(folder)


def test_the_licence_goes_along_and_nothing_of_this_machine_is_named_in_the_model(merge, tiny, tmp_path):
    shutil.copytree(tiny, base := tmp_path / "base")
    (base / "LICENSE.txt").write_text("be kind")
    _, folder = merge(base)
    assert (folder / "LICENSE.txt").read_text() == "be kind"
    assert not [path for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]


def test_a_merge_that_loses_the_adapters_scale_is_refused(merge, bfloat16, monkeypatch):
    def halved(model, dtypes, folder):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] /= 2
        save(model, dtypes, folder)

    save = merging._save
    monkeypatch.setattr(merging, "_save", halved)
    with pytest.raises(InvalidError, match="is not base and adapter together: their log-probabilities differ by"):
        merge(bfloat16)


def test_an_adapter_that_changes_nothing_is_refused(merge, tiny):
    with pytest.raises(InvalidError, match="the adapter changed nothing"):
        merge(tiny, strength=0.0)


def test_an_adapter_that_is_not_finite_or_of_another_model_is_refused(merge, tiny, tmp_path):
    save_adapter(tiny, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(InvalidError, match="cannot be merged"):
        merge(tiny)
    shutil.rmtree(tmp_path / "merged")
    save_file(tensors | {name: torch.ones(3, 3)}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(InvalidError, match="does not fit its base model"):
        merge(tiny)


@pytest.fixture
def checkpoint(installation, tiny, tmp_path):
    """A registered checkpoint with a real adapter, of a staged model with its manifest."""
    location = installation.root.model("tiny")
    shutil.copytree(tiny, location)
    listed = manifest.build(location)
    manifest.write(listed, location)
    with write_transaction():
        BaseModel.create(
            name="tiny", revision="r1", digest=listed.digest, location=str(location), source=str(tiny),
            metadata={"max_position_embeddings": 512}, owner="somebody", created_at=now(),
        )  # fmt: skip
    job = installation.job("first")
    adapter = installation.root.job(job.id).adapter
    save_adapter(location, adapter)
    files = {path.name: FileEntry(*sha256_file(path)) for path in adapter.iterdir()}
    summary = AdapterSummary(lora_rank=4, target_modules=["q_proj"], files=files)
    outcome = Succeeded(steps=3, final_loss=0.5, examples=3, tokens=300, peak_memory_bytes=1, adapter=summary)
    installation.write_started(job)
    installation.write_outcome(job, outcome)
    installation.write_exit(job, 0)
    installation.sync()
    return queries.find_checkpoint("first")


def test_the_command_merges_in_the_training_environment(installation, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = installation.run("checkpoint", "export", "first", str(out / "m"), "--merged", "--json", check=0)
    view = json.loads(done.stdout)
    assert done.stderr == ""
    assert view["merged"] and view["agreement"]["distance"] < 1e-4
    manifest.verify_folder(out / "m", view["digest"])
    assert "library_name: transformers" in (out / "m" / "README.md").read_text()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(os.listdir(out / "m"))
    assert os.listdir(out) == ["m"]


def test_a_merge_that_is_killed_leaves_nothing_at_the_destination(installation, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    words = ("checkpoint", "export", "first", str(out / "m"), "--merged")
    done = installation.run(*words, check=1, TFSLURM_FAULT="merge-saved")  # the program dies, the command goes on
    assert "merging was killed by SIGKILL" in done.stderr
    assert os.listdir(out) == []
    assert installation.run(*words, TFSLURM_FAULT="export-settled").returncode == -9
    assert os.listdir(out) == [f"{TEMPORARY}m"]


def test_a_base_model_whose_bytes_changed_is_not_merged(installation, checkpoint, tmp_path):
    config = installation.root.model("tiny") / "config.json"
    config.write_text(config.read_text().replace("0.2", "0.3"))
    done = installation.run("checkpoint", "export", "first", str(tmp_path / "m"), "--merged", check=5)
    assert "config.json: its bytes have changed" in done.stderr
    assert not (tmp_path / "m").exists()
