"""The site's typed configuration: what is in force, and from which file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tfslurm import configs
from tfslurm.errors import ConfigurationError, InvalidError, NotFoundError
from tfslurm.layers import Layers
from tfslurm.paths import Root

Purpose = Literal["training", "serving", "import"]

SEARCH = (Path("~/.config/tfslurm/site.yaml"), Path("/etc/tfslurm/site.yaml"))
"""Where a site's file is looked for when neither --config nor TFSLURM_CONFIG names one."""


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping in which an unknown key is an error: a typo must not silently mean the default."""


class Environments(Strict):
    """The Python interpreters of the nodes; null means the one that runs this command."""

    core: str | None = None
    train: str | None = None
    serve: str | None = None


Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Days = Annotated[float, msgspec.Meta(ge=0)]
GpuMemory = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)?[MGT]$")]


class SlurmSite(Strict):
    """How this site's Slurm is spoken to."""

    command_timeout: float = 30.0
    poll_floor: float = 10.0
    grace: float = 120.0
    listing_timeout: Positive = 1.0
    gpu_request: Literal["gres", "gpus-per-node"] = "gres"
    account: str | None = None
    qos: str | None = None
    requeue: bool = True
    leave_seconds: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 120
    barren_attempts: Count = 3
    stop_timeout: Positive = 600.0


class Trainer(Strict):
    """What the site chooses and the user does not see as a hyperparameter."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    micro_batch_tokens: int = 4096
    overlong: Literal["truncate", "drop"] = "truncate"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    lora_dropout: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_checkpointing: bool = False
    verify_days: float = 7.0
    save_minutes: Positive = 15.0
    validation_split: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    validations: Count = 5


class WandbSite(Strict):
    """Where Weights & Biases gets a job's metrics."""

    mode: Literal["offline", "online"] = "offline"
    project: str = "tfslurm"
    entity: str | None = None


class MlflowSite(Strict):
    """Where MLflow gets a job's metrics."""

    uri: str | None = None
    experiment: str = "tfslurm"


class TrainingSite(Strict):
    """What every fine-tuning job starts from."""

    instance: str = "auto"
    trainer: Trainer = Trainer()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    wandb: WandbSite = WandbSite()
    mlflow: MlflowSite = MlflowSite()


class ServingSite(Strict):
    """What every inference endpoint starts from."""

    instance: str = "auto"
    max_context: int = 4096
    start_timeout: float = 1800.0


class ImportSite(Strict):
    """Where imports run."""

    instance: str = "auto"


class ReclaimSite(Strict):
    """How long bytes that nobody needs stay, in days."""

    grace: Days = 7.0
    trash_grace: Days = 2.0
    unused_tokens: Days = 30.0
    resume: Days = 7.0
    jobs: Days = 90.0


class Site(Strict):
    """The content of site.yaml."""

    root: str
    database: str | None = None
    environments: Environments = Environments()
    slurm: SlurmSite = SlurmSite()
    training: TrainingSite = TrainingSite()
    serving: ServingSite = ServingSite()
    imports: ImportSite = ImportSite()
    reclaim: ReclaimSite = ReclaimSite()


class Container(Strict):
    """An image in which the node's program runs."""

    image: str
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    options: list[str] = []


class Prologue(Strict):
    """What the script does before its program: in this order."""

    modules: list[str] = []
    conda: str | None = None
    virtualenv: str | None = None
    environment: dict[str, str] = {}
    commands: list[str] = []


class Instance(Strict):
    """A named size of machine: what is asked of Slurm, or of this machine."""

    name: str
    description: str = ""
    purposes: tuple[Purpose, ...] = ("training", "serving", "import")
    launcher: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    nodes: Count = 1
    processes_per_node: Count = 1
    cpus_per_process: Count = 1
    gpus_per_node: Annotated[int, msgspec.Meta(ge=0)] = 0
    gpu_type: str | None = None
    gpu_memory: GpuMemory | None = None
    gpu_request: Literal["gres", "gpus-per-node"] | None = None
    memory: str | None = None
    time: str | int = "1-00:00:00"
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    options: dict[str, str | int | bool] = {}
    prologue: Prologue = Prologue()
    container: Container | None = None
    engine_options: dict[str, str | int | float | bool] = {}

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


class Range(Strict):
    """The default of one hyperparameter and the values that are allowed, both ends included."""

    default: float
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError(f"the default {self.default:g} is not between {self.minimum:g} and {self.maximum:g}")


class HyperparameterRanges(Strict):
    """A range for each of the six numbers."""

    learning_rate: Range
    epochs: Range
    effective_batch_size: Range
    max_seq_length: Range
    lora_rank: Range
    lora_alpha: Range


class ModelSettings(Strict):
    """What models.yaml says of one base model."""

    hyperparameters: HyperparameterRanges
    formats: tuple[str, ...] = ("conversational", "instruction", "text", "pretokenized")


class InstancesFile(Strict):
    """The top of instances.yaml; null removes an instance of the file below."""

    instances: dict[str, Any]


class ModelsFile(Strict):
    """The top of models.yaml."""

    defaults: dict
    models: dict[str, Any] = {}


@dataclass(frozen=True)
class Settings:
    """All three files; instances and models are read when they are first asked for."""

    site: Site
    site_layers: Layers
    config: Path | None
    """The site's own file, where there is one."""

    @cached_property
    def root(self) -> Root:
        return Root(Path(self.site.root))

    @cached_property
    def instance_layers(self) -> Layers:
        return self._load("instances.yaml")

    @cached_property
    def model_layers(self) -> Layers:
        return self._load("models.yaml")

    @cached_property
    def instances(self) -> dict[str, Instance]:
        """Every instance by name, in the order of the file: the smallest first."""
        layers = self.instance_layers
        named = layers.convert(InstancesFile).instances
        return {n: layers.convert(Instance, "instances", n, name=n) for n in named if named[n] is not None}

    def instance(self, name: str, purpose: Purpose) -> Instance:
        """The instance that `name` means for `purpose`; `auto` is the first that this machine can use.

        Raises NotFoundError for an unknown name, InvalidError for one that does not serve the purpose.
        """
        if name == "auto":
            return self.instances_for_auto(purpose)[0]
        usable = [i for i in self.instances.values() if purpose in i.purposes]
        if name not in self.instances:
            raise NotFoundError(f"no instance '{name}'", hint=f"There are: {', '.join(self.instances)}.")
        if self.instances[name] not in usable:
            raise InvalidError(
                f"instance '{name}' is not for {purpose}", hint=f"These are: {', '.join(i.name for i in usable)}."
            )
        return self.instances[name]

    def instances_for_auto(self, purpose: Purpose) -> list[Instance]:
        """What `auto` may choose from, the smallest first: Slurm's instances where sbatch is there, else local ones.

        Raises ConfigurationError where none is for `purpose`.
        """
        import shutil  # no listing needs it

        launcher = "slurm" if shutil.which("sbatch") else "local"
        usable = [i for i in self.instances.values() if purpose in i.purposes]
        if not usable:
            raise ConfigurationError(f"no instance in instances.yaml is for {purpose}")
        return [i for i in usable if i.launcher == launcher] or usable

    def model(self, name: str) -> ModelSettings:
        """What models.yaml says of the base model: its own entry over `defaults`."""
        self.model_layers.convert(ModelsFile)
        return self.model_layers.overlaid(("defaults",), ("models", name)).convert(ModelSettings)

    def python(self, environment: Literal["core", "train", "serve"]) -> str:
        """The interpreter of one of the nodes' environments."""
        return getattr(self.site.environments, environment) or self.site.environments.core or sys.executable

    def _load(self, name: str) -> Layers:
        own = [self.config.with_name(name)] if self.config else []
        return Layers.load(packaged(name), *own)


def packaged(name: str) -> Path:
    """The default file that ships with the package."""
    return Path(configs.__file__).with_name(name)


def load(config: Path | None = None, root: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in force: `config`, else TFSLURM_CONFIG, else the first of SEARCH, over the defaults.

    Raises ConfigurationError naming file, line and key; also where a named file is missing.
    """
    chosen = config or (Path(environ["TFSLURM_CONFIG"]) if environ.get("TFSLURM_CONFIG") else None)
    if chosen and not chosen.is_file():
        raise ConfigurationError(f"{chosen}: no such configuration file")
    own = chosen or next((p.expanduser() for p in SEARCH if p.expanduser().is_file()), None)
    layers = Layers.load(packaged("site.yaml"), *([own.absolute()] if own else []))
    override = root or environ.get("TFSLURM_ROOT")
    site = layers.convert(Site, **({"root": str(override)} if override else {}))
    path = Path(os.path.expandvars(site.root)).expanduser().absolute()
    return Settings(msgspec.structs.replace(site, root=str(path)), layers, own.absolute() if own else None)


def in_force(settings: Settings) -> list[tuple[str, Any, str]]:
    """Every setting of site.yaml as (key, value, where it was set), for `doctor`."""
    rows = []
    for key, value in _leaves(msgspec.to_builtins(settings.site)):
        rows.append((".".join(key), value, settings.site_layers.origin(*key)))
    return rows


def _leaves(value: Any, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, below in value.items() for leaf in _leaves(below, (*at, key))]
    return [(at, value)]
