from __future__ import annotations

import json
import os
import shutil

import pytest

from tfslurm.errors import InvalidError, StatusError
from tfslurm.training.staging import inspect_folder, main, stage_folder, stage_gguf


@pytest.fixture
def source(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "source")
    return tmp_path / "source"


def test_a_folder_is_copied_without_what_training_does_not_need(source, tmp_path):
    (source / "optimizer.pt").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    staged = stage_folder(source, tmp_path / "models" / "m")
    assert staged.architecture == "LlamaForCausalLM" and staged.max_position_embeddings == 512
    names = {path.name for path in (tmp_path / "models" / "m").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"optimizer.pt", "pytorch_model.bin"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


def test_the_same_weights_for_another_program_are_left_out_and_not_counted(source, tmp_path):
    shutil.copyfile(source / "model.safetensors", source / "consolidated.safetensors")
    plain, staged = stage_folder(source, tmp_path / "a"), inspect_folder(source)
    assert staged == plain and not (tmp_path / "a" / "consolidated.safetensors").exists()
    os.rename(source / "model.safetensors", source / "model-00001-of-00001.safetensors")
    names = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(names))
    assert stage_folder(source, tmp_path / "b") == plain
    assert not (tmp_path / "b" / "consolidated.safetensors").exists()


def test_parameters_are_counted_from_the_headers(source, tmp_path):
    from transformers import AutoModelForCausalLM

    staged = stage_folder(source, tmp_path / "m")
    assert staged.parameters == AutoModelForCausalLM.from_pretrained(tmp_path / "m").num_parameters()


def test_links_are_followed_as_in_the_hubs_cache(source, tmp_path):
    os.rename(source / "model.safetensors", tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    stage_folder(source, tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").is_symlink()


def test_an_existing_model_is_not_touched(source, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(StatusError, match="exists already"):
        stage_folder(source, tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda s: (s / "model.safetensors").unlink(), "no .safetensors file"),
        (lambda s: (s / "config.json").unlink(), "no config.json"),
        (lambda s: (s / "config.json").write_text("{"), "is not JSON"),
        (lambda s: (s / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "quantization_config"),
        (lambda s: (s / "model.safetensors").write_bytes(b"short"), "no safetensors file"),
        (lambda s: [p.unlink() for p in s.glob("tokenizer*")], "tokenizer does not load"),
        (
            lambda s: (s / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "lacks b.safetensors",
        ),
    ],
)
def test_a_broken_folder_is_refused_and_nothing_is_left(source, tmp_path, break_it, match):
    break_it(source)
    with pytest.raises(InvalidError, match=match):
        stage_folder(source, tmp_path / "models" / "m")
    assert not (tmp_path / "models").exists() or list((tmp_path / "models").iterdir()) == []


def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(InvalidError, match="cannot be read as a model"):
        stage_gguf(tmp_path / "x.gguf", tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_commands_last_line_describes_the_model(source, tmp_path, capsys):
    assert main(["--path", str(source), str(tmp_path / "m")]) == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert described.keys() == {"architecture", "parameters", "vocabulary_size", "max_position_embeddings"}
    assert main(["--path", str(source), str(tmp_path / "m")]) == 4
    assert "exists already" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


def test_the_real_model_answers_once_staged(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")
