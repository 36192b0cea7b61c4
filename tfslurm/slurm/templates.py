"""Batch scripts: pure renders of a typed spec, from the packaged templates or a site's own."""

from __future__ import annotations

import re
import shlex
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from tfslurm import __version__, sbatch_templates
from tfslurm.errors import ConfigurationError, TfslurmError
from tfslurm.settings import Container, Instance, Settings
from tfslurm.slurm.directives import RESERVED, directives, written

__all__ = ["RESERVED", "Array", "Script", "Template", "directives", "render"]

Template = Literal["train", "import", "serve", "sync"]

PACKAGED = Path(sbatch_templates.__file__).parent

FOLDER = "sbatch_templates"
"""Beside a site's site.yaml: the templates that it lays over the packaged ones."""


@dataclass(frozen=True)
class Array:
    """What is particular to a script whose tasks are submissions of their own."""

    size: int
    cells: Path
    max_parallel: int | None = None

    @property
    def indices(self) -> str:
        """From 0, whatever comes before: MaxArraySize limits the index itself."""
        return f"0-{self.size - 1}" + (f"%{self.max_parallel}" if self.max_parallel else "")


@dataclass(frozen=True)
class Script:
    """Everything that a batch script depends on."""

    template: Template
    uuid: str
    kind: str
    object_id: str
    folder: Path
    """Of what runs; of an array, the array's own: each task finds its own in the cells."""
    instance: Instance
    python: str
    core_python: str
    root: Path
    config: Path | None = None
    gpu_request: str = "gres"
    account: str | None = None
    qos: str | None = None
    first_attempt: int = 0
    exclude: tuple[str, ...] = ()
    array: Array | None = None
    requeue: bool = True
    leave_seconds: int = 120
    barren_attempts: int = 3
    minutes: int = 5
    """Between two runs of a sync that submits itself."""

    @classmethod
    def of(cls, settings: Settings, template: Template, instance: Instance, folder: Path, **fields: Any) -> Script:
        """The script of an object, with what the site's settings say."""
        environment = {"train": "train", "serve": "serve", "import": "core", "sync": "core"}[template]
        slurm = settings.site.slurm
        return cls(
            template=template,
            folder=folder,
            instance=instance,
            python=settings.python(environment),
            core_python=settings.python("core"),
            root=settings.root.path,
            config=settings.config,
            gpu_request=instance.gpu_request or slurm.gpu_request,
            account=instance.account or slurm.account,
            qos=instance.qos or slurm.qos,
            requeue=slurm.requeue,
            leave_seconds=slurm.leave_seconds,
            barren_attempts=slurm.barren_attempts,
            **fields,
        )


def render(script: Script) -> str:
    """The text of the script.

    The site's own template of that name counts where there is one beside its site.yaml; it may extend
    "packaged/train.sh.j2" and fill its blocks. Templates see the fields of Script and those below.
    Raises ConfigurationError for a value that could not be written into it safely, and for an error in a
    site's template, naming its file and line.
    """
    instance, container = script.instance, script.instance.container
    program = _program(script.python, container)
    pyxis = _pyxis(container)
    own = script.config.with_name(FOLDER) if script.config else None
    try:
        return (
            _environment(own)
            .get_template(f"{script.template}.sh.j2")
            .render(
                script.__dict__,
                version=__version__,
                options=directives(script),
                prologue=instance.prologue,
                program=program,
                head=f"srun --nodes=1 --ntasks=1 {pyxis}{program}" if pyxis else program,
                srun_options=pyxis,
                nodes=instance.nodes,
                world_size=instance.processes,
                threads=instance.cpus_per_process,
                gpus=instance.gpus_per_node,
            )
        )
    except TfslurmError:
        raise
    except Exception as error:
        where = _line_of(error, own)
        if where is None:
            raise
        raise ConfigurationError(f"{where}: {error}", hint="It is a template of the site's own.") from None


def _line_of(error: Exception, own: Path | None) -> str | None:
    """File and line of the site's template where the error is; None where it is in none of them."""
    if own is None:
        return None
    if isinstance(error, jinja2.TemplateSyntaxError) and error.filename:
        places = [(error.filename, error.lineno)]
    else:
        # jinja2 puts the templates' own lines into the traceback.
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    inside = [f"{name}, line {line}" for name, line in places if Path(name).is_relative_to(own)]
    return inside[-1] if inside else None


def _program(python: str, container: Container | None) -> str:
    if container and container.runtime == "apptainer":
        return shlex.join(["apptainer", "exec", *container.options, container.image, python])
    return shlex.quote(python)


def _pyxis(container: Container | None) -> str:
    if not container or container.runtime != "pyxis":
        return ""
    return shlex.join([f"--container-image={container.image}", *container.options]) + " "


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigurationError(f"{name!r} is not a name for an environment variable")
    return name


def _quote(value: object) -> str:
    if "\0" in str(value):
        raise ConfigurationError(f"{value!r} holds a NUL")
    return shlex.quote(str(value))


def _environment(own: Path | None = None) -> jinja2.Environment:
    packaged = jinja2.FileSystemLoader(PACKAGED)
    loaders = [jinja2.PrefixLoader({"packaged": packaged}), packaged]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([*([jinja2.FileSystemLoader(own)] if own else []), *loaders]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(quote=_quote, directive=written, variable=_variable)
    return environment
