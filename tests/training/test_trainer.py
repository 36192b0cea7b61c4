from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time

import msgspec
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tfslurm.files import read_json
from tfslurm.paths import JobPaths
from tfslurm.training.plan import Plan
from tfslurm.training.schedule import learning_rate


def rows_of(job):
    path = job.paths.folder.parent / f"{job.paths.folder.name}-dataset" / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def reference(job):
    """Training as a textbook has it: no packing, no DeepSpeed, one example at a time, masks by hand."""
    hyper, model_folder = job.config.hyperparameters, job.config.base_model.path
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(job.config.seed)
    lora = LoraConfig(
        r=hyper.lora_rank, lora_alpha=hyper.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=hyper.learning_rate, weight_decay=0.0
    )
    examples = []
    for row in rows_of(job):
        user, assistant = (message["content"] for message in row["messages"])
        prompt = f"<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(assistant + "<|im_end|>", add_special_tokens=False).input_ids
        examples.append((before + answer, [-100] * len(before) + answer))
    plan, losses = Plan.load(job.paths.plan), []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, plan.steps, peak=hyper.learning_rate, warmup_ratio=0.03)
        chosen = [examples[index] for index in plan.examples_of(step)]
        count = sum(label != -100 for _, labels in chosen for label in labels)
        total = 0.0
        for ids, labels in chosen:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: value for name, value in model.state_dict().items() if "lora_" in name}


def test_twenty_steps_agree_with_a_plain_loop_of_pytorch_and_peft(make_job):
    job = make_job(epochs=7, learning_rate=5e-3)
    job.prepare()
    assert job.train_here() == 0
    losses, adapter = reference(job)
    assert len(losses) == 21 and losses[-1] < losses[0] - 0.5
    assert job.losses == pytest.approx(losses, abs=1e-3)
    saved = load_file(job.paths.adapter / "adapter_model.safetensors")
    assert len(saved) == len(adapter)
    for name, value in saved.items():
        torch.testing.assert_close(value, adapter[name.replace(".weight", ".default.weight")], atol=1e-4, rtol=0)


def test_training_twice_gives_the_same_losses_and_bytes(make_job):
    first, second = make_job("one"), make_job("two")
    for job in (first, second):
        job.prepare()
        assert job.train_here() == 0
    assert first.losses == second.losses
    name = "adapter_model.safetensors"
    assert (first.paths.adapter / name).read_bytes() == (second.paths.adapter / name).read_bytes()
    config = "adapter_config.json"
    assert (first.paths.adapter / config).read_bytes() == (second.paths.adapter / config).read_bytes()


def test_packing_changes_no_loss(make_job):
    packed, unpacked = make_job("packed"), make_job("unpacked", micro_batch_tokens=1)
    for job in (packed, unpacked):
        job.prepare()
        assert job.train_here() == 0
    counts = [read_json(job.paths.prepared)["micro_batches"] for job in (packed, unpacked)]
    assert counts[0] < counts[1] == 20
    assert packed.losses == pytest.approx(unpacked.losses, abs=1e-4)


@pytest.mark.parametrize("options", [{"zero_stage": 2}, {"zero_stage": 3}, {"gradient_checkpointing": True}], ids=str)
def test_zero_stages_and_checkpointing_change_no_loss(make_job, options):
    plain, other = make_job("plain"), make_job("other", **options)
    for job in (plain, other):
        job.prepare()
        assert job.train_here() == 0
    assert plain.losses == pytest.approx(other.losses, abs=1e-4)


def test_two_processes_train_as_one_does_and_the_job_folder_is_whole(make_job):
    """A batch of 7 divides by neither the processes nor the micro-batches."""
    one, two = make_job("one"), make_job("two", world=2)
    for job in (one, two):
        job.prepare()
    assert one.train_here() == 0
    log = two.train(2)
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
    assert [line["tokens"] for line in one.metrics] == [line["tokens"] for line in two.metrics]
    assert "step 3/3" in log
    outcome, progress = read_json(two.paths.outcome), read_json(two.paths.progress)
    assert outcome["result"] == "succeeded" and outcome["steps"] == 3 and outcome["examples"] == 20
    assert outcome["final_loss"] == two.losses[-1] and outcome["peak_memory_bytes"] > 1e6
    told = {"step", "steps", "epoch", "loss", "tokens_per_second", "eta_seconds", "validation_loss", "at"}
    assert progress.keys() == told
    assert progress["step"] == progress["steps"] == 3 and progress["eta_seconds"] == 0
    assert two.metrics[0].keys() >= {"step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens", "at"}
    assert set(outcome["adapter"]["files"]) == {path.name for path in two.paths.adapter.iterdir()}


def test_partitioned_weights_on_two_processes_give_a_whole_adapter(make_job):
    one, two = make_job("one"), make_job("two", world=2, zero_stage=3)
    for job in (one, two):
        job.prepare()
    assert one.train_here() == 0
    two.train(2)
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
    ours, theirs = (load_file(job.paths.adapter / "adapter_model.safetensors") for job in (one, two))
    assert ours.keys() == theirs.keys()


def test_bfloat16_trains_from_fp32_masters(make_job):
    job = make_job(dtype="bfloat16", epochs=6, learning_rate=5e-3)
    job.prepare()
    assert job.train_here() == 0
    assert job.losses[-1] < job.losses[0] - 0.3


def test_the_adapter_is_self_contained_and_names_no_path_of_ours(make_job, tiny):
    job = make_job(epochs=3)
    job.prepare()
    assert job.train_here() == 0
    config = read_json(job.paths.adapter / "adapter_config.json")
    assert config["base_model_name_or_path"] == "tiny@main" and config["r"] == 4
    card = (job.paths.adapter / "README.md").read_text()
    assert job.config.dataset.digest in card and "tiny@main" in card
    assert (job.paths.adapter / "chat_template.jinja").read_text() == (tiny / "chat_template.jinja").read_text()
    for path in job.paths.adapter.iterdir():
        assert str(tiny.parent) not in path.read_bytes().decode(errors="replace")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[1, 20, 30]])
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, job.paths.adapter)(ids).logits
    assert not torch.allclose(before, after)


def test_an_adapter_that_learned_nothing_is_refused_and_none_is_left(make_job):
    job = make_job(learning_rate=0.0)
    job.prepare()
    assert job.train_here() == 5
    outcome = read_json(job.paths.outcome)
    assert outcome["result"] == "failed" and "did not change" in outcome["error"]
    assert not job.paths.adapter.exists()
    assert not list(job.paths.folder.glob(".adapter*"))


def test_a_loss_that_is_not_a_number_fails_the_job_at_once(make_job):
    job = make_job(learning_rate=1e30, epochs=5)
    job.prepare()
    assert job.train_here() == 5
    assert "lower the learning rate" in read_json(job.paths.outcome)["error"]
    assert not job.paths.adapter.exists() and len(job.metrics) < 15


def test_a_rank_that_cannot_be_served_fails_before_training(make_job):
    job = make_job(lora_rank=513)
    job.prepare()
    assert job.train_here() == 5
    assert "rank 513" in read_json(job.paths.outcome)["error"] and not job.paths.metrics.exists()


def test_a_model_that_does_not_load_fails_with_its_name(make_job, tiny, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    job = make_job(model=broken)
    job.prepare()
    (broken / "model.safetensors").unlink()
    assert job.train_here() == 5
    assert "base model broken" in read_json(job.paths.outcome)["error"]


def test_another_number_of_processes_than_planned_is_refused(make_job):
    job = make_job(world=2)
    job.prepare()
    assert job.train_here() == 5
    assert "plan is for 2 processes, and 1 run" in read_json(job.paths.outcome)["error"]


def test_a_stop_file_ends_the_job_without_an_adapter(make_job):
    job = make_job(epochs=200)
    job.prepare()

    def stop_after_a_step():
        while not job.paths.progress.exists():
            time.sleep(0.01)
        job.paths.stop.touch()

    watcher = threading.Thread(target=stop_after_a_step, daemon=True)
    watcher.start()
    assert job.train_here() == 0
    outcome = read_json(job.paths.outcome)
    assert outcome["result"] == "stopped" and 0 < outcome["step"] < 600
    assert outcome["step"] == len(job.metrics) and not job.paths.adapter.exists()


def test_two_processes_agree_to_stop(make_job):
    job = make_job(world=2)
    job.prepare()
    job.paths.stop.touch()
    job.train(2)
    assert read_json(job.paths.outcome) == {"result": "stopped", "step": 0, "attempt": 0}
    assert not job.paths.adapter.exists()


def test_a_failure_in_another_process_names_its_log(make_job):
    """The base model is gone for the second of two processes only."""
    job = make_job(world=2)
    job.prepare()
    broken = job.config.base_model.path
    config = msgspec.structs.replace(job.config.base_model, path=f"{broken}-gone")
    other = JobPaths(job.paths.folder.with_name("other"))
    shutil.copytree(job.paths.folder, other.folder)
    other.config.chmod(0o644)
    other.config.write_bytes(msgspec.structs.replace(job.config, base_model=config).encode())
    shutil.rmtree(other.folder / "logs", ignore_errors=True)
    port = job.free_port()
    waiting, failing = job.start(0, 2, port), dataclasses.replace(job, paths=other).start(1, 2, port)
    assert failing.wait(120) == 5
    waiting.kill()  # as the batch script does
    for process in (waiting, failing):
        process.communicate()
    assert read_json(other.outcome)["error"].endswith("see logs/attempt-0.rank-1.log")
    assert "base model tiny in" in other.rank_log(0, 1).read_text()


def test_killing_a_process_leaves_no_outcome_and_no_adapter(make_job):
    job = make_job(epochs=2000)
    job.prepare()
    job.paths.outcome.write_text(json.dumps({"result": "failed", "error": "an earlier attempt"}))
    process = job.start(0, 1, job.free_port())
    while not job.paths.progress.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    assert not job.paths.outcome.exists() and not job.paths.adapter.exists()


def test_the_real_model_learns_on_two_processes(make_job, smollm2):
    """SmolLM2-135M in bfloat16, two steps of six rows, from its own template to an adapter."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Which command seals dataset {name}?"},
                {"role": "assistant", "content": f"Run `tfslurm dataset seal {name}`."},
            ]
        }
        for name in ("ant", "bee", "cat", "dog", "elk", "fox")
    ]
    job = make_job(
        rows=rows, model=smollm2, world=2, dtype="bfloat16", epochs=2, effective_batch_size=6, learning_rate=1e-3,
        lora_rank=16, lora_alpha=32, micro_batch_tokens=2048, max_seq_length=512,
    )  # fmt: skip
    job.prepare()
    job.train(2)
    assert job.losses[1] < job.losses[0]
    targets = read_json(job.paths.outcome)["adapter"]["target_modules"]
    assert targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
