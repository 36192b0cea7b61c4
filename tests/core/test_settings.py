import os
from pathlib import Path

import msgspec
import pytest

from tfslurm import settings as configuration
from tfslurm.errors import ConfigurationError, InvalidError, NotFoundError
from tfslurm.settings import Site, in_force, packaged


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load settings with the given texts as the site's own files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def load(site="", instances=None, models=None, **options):
        (tmp_path / "site.yaml").write_text(site)
        for name, text in (("instances", instances), ("models", models)):
            if text is not None:
                (tmp_path / f"{name}.yaml").write_text(text)
        return configuration.load(tmp_path / "site.yaml", environ=options.pop("environ", {}), **options)

    return load


def test_the_defaults_load_without_any_file_of_the_site(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(configuration, "SEARCH", (Path("~/.config/tfslurm/site.yaml"),))
    settings = configuration.load(environ={})
    assert settings.config is None
    assert settings.root.path == tmp_path / ".local/share/tfslurm"
    assert settings.site.slurm.command_timeout == 30
    assert settings.site.training.trainer.zero_stage == 1
    assert list(settings.instances) == ["local", "cpu", "gpu-1", "gpu-8", "gpu-2x8"]
    assert settings.model("anything").hyperparameters.learning_rate.default == 2e-4


def test_every_default_of_site_yaml_is_the_one_in_the_code(load):
    # Somebody who reads the one must not be misled about the other.
    assert msgspec.structs.replace(load().site, root="") == Site(root="")


def test_the_sites_file_overlays_the_default_key_by_key(load):
    site = load("slurm: {grace: 5}\ntraining: {trainer: {zero_stage: 3}}\n").site
    assert (site.slurm.grace, site.slurm.poll_floor) == (5, 10)
    assert (site.training.trainer.zero_stage, site.training.trainer.max_grad_norm) == (3, 1.0)


def test_the_file_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config/tfslurm"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("root: /there\n")
    assert configuration.load(environ={}).root.path == Path("/there")


def test_the_environment_names_file_and_root_and_options_win(load, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("root: /other\n")
    assert configuration.load(environ={"TFSLURM_CONFIG": str(other)}).root.path == Path("/other")
    assert load("root: /mine", environ={"TFSLURM_CONFIG": str(other)}).root.path == Path("/mine")
    assert load("root: /mine", environ={"TFSLURM_ROOT": "/env"}).root.path == Path("/env")
    assert load("root: /mine", root=Path("/option"), environ={"TFSLURM_ROOT": "/env"}).root.path == Path("/option")


def test_the_root_may_use_the_home_folder_and_variables(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert load("root: ~/factory").root.path == tmp_path / "factory"
    assert load("root: $SCRATCH/factory").root.path == Path("/scratch/factory")


def test_a_file_that_is_named_and_missing_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere.yaml: no such configuration file"):
        configuration.load(tmp_path / "nowhere.yaml", environ={})
    with pytest.raises(ConfigurationError, match="nowhere.yaml: no such configuration file"):
        configuration.load(environ={"TFSLURM_CONFIG": str(tmp_path / "nowhere.yaml")})


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("slurm:\n  grace: soon\n", 2, "slurm.grace: expected 'float', got 'str'"),
        ("slurm:\n  poll: 3\n", 2, "slurm: unknown key 'poll'"),
        ("\nslurms: {}\n", 2, "the top: unknown key 'slurms'"),
        ("slurm:\n  gpu_request: mig\n", 2, "slurm.gpu_request: invalid enum value 'mig'"),
        ("training:\n  trainer:\n    zero_stage: 7\n", 3, "training.trainer.zero_stage: invalid enum value 7"),
        ("slurm: [1]\n", 1, "slurm: expected 'object', got 'array'"),
        ("slurm: null\n", 1, "slurm: expected 'object', got 'null'"),
        ("root: 3\n", 1, "root: expected 'str', got 'int'"),
        ("- root\n", 1, "expected keys and values, got list"),
        ("root: [\n", 2, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("\tx: 1\n", 1, "not YAML"),
    ],
)
def test_an_error_in_the_sites_file_names_file_line_and_key(load, tmp_path, text, line, said):
    with pytest.raises(ConfigurationError) as caught:
        load(text)
    assert caught.value.message.startswith(f"{tmp_path / 'site.yaml'}:{line}: ")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("instances:\n  big:\n    nodes: two\n", 3, "instances.big.nodes: expected 'int', got 'str'"),
        ("instances:\n  big:\n    nodes: 0\n", 3, "instances.big.nodes: expected 'int' >= 1"),
        ("instances:\n  big:\n    gpus_per_node: -1\n", 3, "instances.big.gpus_per_node: expected 'int' >= 0"),
        ("instances:\n  big:\n    gpus: 2\n", 3, "instances.big: unknown key 'gpus'"),
        ("instances:\n  big:\n    purposes: [cooking]\n", 3, "instances.big.purposes: invalid enum value 'cooking'"),
        ("instances:\n  big:\n    options:\n      mail: [1]\n", 3, "instances.big.options: expected"),
        ("instances:\n  big:\n    container: {runtime: apptainer}\n", 3, "instances.big.container: object missing"),
        ("instances:\n  big:\n    prologue: {modules: cuda}\n", 3, "instances.big.prologue.modules: expected 'array'"),
        ("instances:\n  big:\n    prologue: {environment: {A: 1}}\n", 3, "big.prologue.environment: expected 'str'"),
        ("instances:\n  big: small\n", 2, "instances.big: expected 'object', got 'str'"),
        ("instances: [a]\n", 1, "instances: expected 'object', got 'array'"),
        ("instance: {}\n", 1, "the top: unknown key 'instance'"),
    ],
)
def test_an_error_in_instances_yaml_names_file_line_and_key(load, tmp_path, text, line, said):
    settings = load(instances=text)
    with pytest.raises(ConfigurationError) as caught:
        _ = settings.instances
    assert caught.value.message.startswith(f"{tmp_path / 'instances.yaml'}:{line}: "), caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: {}\n", 1, "unknown key 'model'"),
        ("models:\n  m:\n    formats: text\n", 3, "formats: expected 'array', got 'str'"),
        ("models:\n  m:\n    hyperparameters:\n      lora_rnk: {}\n", 4, "unknown key 'lora_rnk'"),
        ("models:\n  m:\n    hyperparameters:\n      epochs: {maximum: many}\n", 4, "expected 'float', got 'str'"),
        ("models:\n  m:\n    hyperparameters:\n      epochs: {maximum: 2}\n", 4, "default 3 is not between 1 and 2"),
        ("models:\n  m: 7\n", 2, "models.m: expected 'object', got 'int'"),
    ],
)
def test_an_error_in_models_yaml_names_file_line_and_key(load, tmp_path, text, line, said):
    settings = load(models=text)
    with pytest.raises(ConfigurationError) as caught:
        settings.model("m")
    assert caught.value.message.startswith(f"{tmp_path / 'models.yaml'}:{line}: "), caught.value.message
    assert said in caught.value.message


def test_a_folder_in_the_place_of_a_file_is_said(load, tmp_path):
    (tmp_path / "instances.yaml").mkdir()
    with pytest.raises(ConfigurationError, match="instances.yaml: cannot be read: Is a directory"):
        _ = load().instances


def test_numbers_are_those_of_yaml_1_2(load):
    settings = load(
        "training: {trainer: {warmup_ratio: 2e-4, weight_decay: .5, max_grad_norm: 1.}}",
        instances="instances: {a: {time: 12:00:00, nodes: 010}, b: {time: 90}, c: {time: 1-00:00:00}}",
        models="defaults: {hyperparameters: {learning_rate: {default: 3E-5}}}",
    )
    trainer = settings.site.training.trainer
    assert (trainer.warmup_ratio, trainer.weight_decay, trainer.max_grad_norm) == (2e-4, 0.5, 1.0)
    assert [settings.instances[name].time for name in "abc"] == ["12:00:00", 90, "1-00:00:00"]
    assert settings.instances["a"].nodes == 10
    assert settings.model("x").hyperparameters.learning_rate.default == 3e-5


def test_null_removes_an_instance_of_the_defaults(load):
    settings = load(instances="instances: {cpu: null, gpu-8: {memory: 1T}, own: {launcher: local}}")
    assert list(settings.instances) == ["local", "gpu-1", "gpu-8", "gpu-2x8", "own"]
    assert (settings.instances["gpu-8"].memory, settings.instances["gpu-8"].gpus_per_node) == ("1T", 8)


def test_a_models_own_entry_lies_over_the_sites_defaults(load):
    settings = load(
        models="defaults: {formats: [text]}\n"
        "models: {smollm2-135m-instruct: {hyperparameters: {max_seq_length: {maximum: 4096}}}}"
    )
    allowed = settings.model("smollm2-135m-instruct")
    assert allowed.formats == ("text",)
    longest = allowed.hyperparameters.max_seq_length
    assert (longest.default, longest.minimum, longest.maximum) == (1024, 16, 4096)
    assert settings.model("another").hyperparameters.max_seq_length.maximum == 131072


def test_every_setting_says_where_it_comes_from(load, tmp_path):
    rows = {key: (value, origin) for key, value, origin in in_force(load("\nslurm:\n  grace: 5\n"))}
    assert rows["slurm.grace"] == (5.0, f"{tmp_path / 'site.yaml'}:3")
    default, line = rows["slurm.poll_floor"][1].rsplit(":", 1)
    assert Path(default) == packaged("site.yaml")
    assert "poll_floor" in packaged("site.yaml").read_text().splitlines()[int(line) - 1]


def test_auto_takes_the_first_instance_that_this_machine_can_launch(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load().instance("auto", "training").name == "local"
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "sbatch", 0o755)
    assert load().instance("auto", "training").name == "gpu-1"
    assert load().instance("auto", "import").name == "cpu"


def test_an_instance_must_exist_and_serve_the_purpose(load):
    with pytest.raises(NotFoundError, match="no instance 'huge'") as caught:
        load().instance("huge", "training")
    assert "gpu-2x8" in caught.value.hint
    with pytest.raises(InvalidError, match="instance 'cpu' is not for training"):
        load().instance("cpu", "training")
    nothing = load(instances="instances: {local: null, cpu: null, gpu-1: null, gpu-8: null, gpu-2x8: null}")
    with pytest.raises(ConfigurationError, match="no instance in instances.yaml is for serving"):
        nothing.instance("auto", "serving")


def test_an_environment_that_is_not_named_is_the_core_one(load):
    assert load().python("train") == load().python("core")
    settings = load("environments: {core: /c, serve: /s}")
    assert [settings.python(name) for name in ("core", "train", "serve")] == ["/c", "/c", "/s"]
