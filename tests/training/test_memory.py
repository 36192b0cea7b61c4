from __future__ import annotations

import json
import struct

import msgspec
import pytest
import yaml

from tfslurm import settings as configuration
from tfslurm.errors import InvalidError, NotFoundError
from tfslurm.settings import Instance, Trainer
from tfslurm.training import jobs, sweeps
from tfslurm.training.config import Hyperparameters
from tfslurm.training.memory import choose, estimate, fits, gpu_memory, read_shape

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
DEFAULTS_AWAY = dict.fromkeys(("local", "cpu", "gpu-1", "gpu-8", "gpu-2x8"))
CHECKPOINTED = Trainer(gradient_checkpointing=True)


def hyperparameters(**more):
    six = dict(learning_rate=1e-4, epochs=1, effective_batch_size=8, max_seq_length=4096, lora_rank=16, lora_alpha=16)
    return Hyperparameters(**six | more)


@pytest.fixture
def llama(tmp_path):
    """The headers of Llama-2-7B in two shards, without the weights."""
    return write_model(tmp_path / "llama", LLAMA_2_7B)


def write_model(folder, config):
    """config.json, and the headers of two shards with an index."""
    hidden, feed, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for layer in range(layers):
        below = f"model.layers.{layer}."
        shapes |= {f"{below}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{below}mlp.{name}_proj.weight": [feed, hidden] for name in ("gate", "up")}
        shapes[f"{below}mlp.down_proj.weight"] = [hidden, feed]
        shapes |= {f"{below}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, where = sorted(shapes), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        entries = {name: {"dtype": "BF16", "shape": shapes[name], "data_offsets": [0, 0]} for name in part}
        header = json.dumps(entries | {"__metadata__": {"format": "pt"}}).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    # The same weights for another program, as some models on the Hub have them.
    (folder / "consolidated.safetensors").write_bytes((folder / file).read_bytes())
    return folder


def test_a_models_sizes_come_from_its_configuration_and_headers_and_no_weight_counts_twice(llama):
    shape = read_shape(llama)
    assert shape.parameters == 6_738_415_616
    assert shape.adaptable == 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert (shape.layers, shape.key_values, shape.vocabulary) == (32, 4096, 32000)


def test_the_published_memory_of_a_7b_model_is_met_within_a_twentieth(llama):
    """LongLoRA, https://arxiv.org/abs/2309.12307, table 12: 25.7 GB on each of eight GPUs, plain LoRA, ZeRO-2."""
    trainer = msgspec.structs.replace(CHECKPOINTED, zero_stage=2)
    needed = estimate(llama, hyperparameters(max_seq_length=8192, lora_rank=8), trainer, world_size=8)
    assert needed.total / 1e9 == pytest.approx(25.7, rel=0.05)
    assert needed.base == 2 * 6_738_415_616
    assert needed.activations == 8192 * (2 * 4096 * 32 + 12 * 4096 + 4 * 4096 + 8 * 11008)


def test_what_the_site_sets_moves_the_parts_that_it_should(llama):
    def parts(world_size=1, **trainer):
        return estimate(llama, hyperparameters(), Trainer(**trainer), world_size)

    plain = parts()
    assert plain.adapter == 16 * read_shape(llama).adaptable * 20
    assert parts(gradient_checkpointing=True).activations < plain.activations / 10
    assert parts(zero_stage=3, world_size=8).base == plain.base // 8
    assert parts(zero_stage=3, world_size=8).adapter == plain.adapter // 8
    assert parts(zero_stage=1, world_size=4).adapter == plain.adapter * (8 + 3) // 20
    assert parts(dtype="float32").base == 2 * plain.base
    assert parts(micro_batch_tokens=8192).activations == 2 * plain.activations
    assert plain.total == pytest.approx(1.08 * sum((plain.base, plain.adapter, plain.activations, plain.logits,
                                                    plain.runtime)), rel=1e-6)  # fmt: skip


def test_a_row_that_is_longer_than_a_micro_batch_sets_the_activations(llama):
    short, long = (estimate(llama, hyperparameters(max_seq_length=n), Trainer(), 1) for n in (512, 8192))
    assert long.logits == 2 * short.logits


def test_a_model_that_says_too_little_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidError, match="no .safetensors file"):
        read_shape(tmp_path)
    folder = write_model(tmp_path / "m", LLAMA_2_7B)
    (folder / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(InvalidError, match=r"config.json has no hidden_size"):
        read_shape(folder)


@pytest.mark.parametrize(("text", "size"), [("80G", 80 * 2**30), ("40960M", 40960 * 2**20), ("0.5T", 2**39)])
def test_gpu_memory_is_read_in_binary_units(text, size):
    assert gpu_memory(Instance(name="a", gpus_per_node=1, gpu_memory=text)) == size
    assert gpu_memory(Instance(name="a", gpu_memory=text)) is None


def test_whether_something_fits_is_unknown_without_gpu_memory(llama):
    needed = estimate(llama, hyperparameters(), Trainer(), 1)
    assert fits(Instance(name="a", gpus_per_node=1), needed) is None
    assert fits(Instance(name="a", gpus_per_node=1, gpu_memory="24G"), needed) is False
    assert fits(Instance(name="a", gpus_per_node=1, gpu_memory="80G"), needed) is True


@pytest.fixture
def site(tmp_path, program, monkeypatch):
    """Settings with the given instances, on a machine that has Slurm."""
    monkeypatch.setenv("PATH", str(program("sbatch", "exit 1").parent))

    def site(trainer=None, **instances):
        gpu = {"purposes": ["training"], "gpus_per_node": 1}
        listed = DEFAULTS_AWAY | {name: gpu | {"gpu_memory": memory} for name, memory in instances.items()}
        (tmp_path / "instances.yaml").write_text(yaml.safe_dump({"instances": listed}, sort_keys=False))
        own = {"root": str(tmp_path / "root"), "training": {"trainer": trainer or {"gradient_checkpointing": True}}}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(own))
        return configuration.load(tmp_path / "site.yaml", environ={})

    return site


def test_auto_takes_the_smallest_instance_that_fits(site, llama):
    settings = site(small="16G", middle="40G", large="80G")
    chosen = choose(settings, "auto", llama, hyperparameters())
    assert (chosen.instance.name, chosen.remark) == ("middle", None)
    assert 16 * 2**30 < chosen.estimate.total < 40 * 2**30
    longest = choose(settings, "auto", llama, hyperparameters(max_seq_length=32768))
    assert longest.instance.name == "large"


def test_auto_takes_an_instance_of_unknown_memory_as_it_comes_and_says_so(site, llama):
    chosen = choose(site(small="16G", unknown=None, large="80G"), "auto", llama, hyperparameters())
    assert chosen.instance.name == "unknown"
    assert "gives it no gpu_memory" in chosen.remark and chosen.estimate.total > 16 * 2**30


def test_where_nothing_fits_auto_says_what_is_missing(site, llama):
    with pytest.raises(InvalidError, match=r"fits no instance; on 'b' it needs about [0-9.]+ GiB a GPU, of 16.0") as no:
        choose(site(b="16G", a="8G"), "auto", llama, hyperparameters())
    assert "--max-seq-length" in no.value.hint


def test_an_instance_that_is_named_is_taken_with_a_warning_in_numbers(site, llama):
    chosen = choose(site(small="16G", large="80G"), "small", llama, hyperparameters())
    assert chosen.instance.name == "small"
    assert "may not fit 'small': it needs about" in chosen.remark and "GiB base" in chosen.remark
    with pytest.raises(NotFoundError):
        choose(site(small="16G"), "huge", llama, hyperparameters())


def test_a_model_of_unknown_size_gets_the_first_instance_and_the_reason(site, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    chosen = choose(site(small="16G", large="80G"), "auto", tmp_path, hyperparameters())
    assert (chosen.instance.name, chosen.estimate) == ("small", None)
    assert "is not known: " in chosen.remark


def test_a_size_without_a_unit_is_refused_with_its_line(site):
    from tfslurm.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match=r"instances.yaml:\d+: instances.small.gpu_memory"):
        _ = site(small="80").instances


@pytest.fixture
def cluster(installation):
    """An installation whose model is Llama-2-7B, with instances of three sizes of GPU."""
    gpu = {"launcher": "local", "purposes": ["training"], "gpus_per_node": 1}
    sizes = {"small": "16G", "middle": "48G", "large": "80G"}
    listed = DEFAULTS_AWAY | {name: gpu | {"gpu_memory": memory} for name, memory in sizes.items()}
    (installation.folder / "instances.yaml").write_text(yaml.safe_dump({"instances": listed}, sort_keys=False))
    installation.configure(training={"instance": "auto"})
    installation.dataset("chats")
    write_model(installation.root.model(installation.model().name), LLAMA_2_7B)
    return installation


def test_a_dry_run_prints_the_estimate_and_the_warning_and_auto_passes_over_what_is_too_small(cluster):
    before = cluster.everything()
    words = ("job", "create", "--model", "tiny", "--dataset", "chats", "--dry-run")
    memory = cluster.json(*words)["memory"]
    assert (memory["available_bytes"], memory["remark"]) == (48 * 2**30, None)
    assert memory["total_bytes"] == sum(memory["parts"].values())
    assert memory["parts"]["base_bytes"] == 2 * 6_738_415_616
    done = cluster.run(*words, "--instance", "small", check=0)
    assert "# --- memory of each GPU, estimated\n" in done.stdout
    assert "# this job may not fit 'small': it needs about" in done.stdout
    assert cluster.everything() == before


def test_the_instance_of_a_sweep_does_for_its_largest_cell(cluster):
    fixed = jobs.Request("tiny", "chats", {"epochs": 1})
    small, large = (
        sweeps.plan(cluster.settings, sweeps.Request(fixed, (("lora_rank", ranks), ("seed", (1, 2)))))
        for ranks in ((4, 8), (8, 512))
    )
    assert (small.instance.name, large.instance.name) == ("middle", "large")
