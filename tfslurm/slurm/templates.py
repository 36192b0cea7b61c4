"""Batch scripts: pure renders of a typed spec. https://slurm.schedmd.com/sbatch.html"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from tfslurm import __version__, sbatch_templates
from tfslurm.errors import ConfigurationError
from tfslurm.settings import Container, Instance, Settings

Template = Literal["train", "import", "serve"]

RESERVED = frozenset(
    "job-name comment output error open-mode export requeue no-requeue nodes ntasks ntasks-per-node cpus-per-task "
    "mem time partition account qos reservation constraint gres gpus-per-node array chdir signal parsable wrap "
    "wait dependency test-only clusters uid gid input".split()
)
"""Options that the platform sets itself, or that would break what it relies on."""

FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\"'\\`$]")


@dataclass(frozen=True)
class Script:
    """Everything that a batch script depends on."""

    template: Template
    uuid: str
    kind: str
    object_id: str
    folder: Path
    instance: Instance
    python: str
    core_python: str
    root: Path
    config: Path | None = None
    gpu_request: str = "gres"
    account: str | None = None
    qos: str | None = None

    @classmethod
    def of(cls, settings: Settings, template: Template, instance: Instance, folder: Path, **fields: str) -> Script:
        """The script of an object, with what the site's settings say."""
        environment = {"train": "train", "serve": "serve", "import": "core"}[template]
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
            **fields,
        )


def render(script: Script) -> str:
    """The text of the script.

    Raises ConfigurationError for a value that could not be written into it safely.
    """
    instance, container = script.instance, script.instance.container
    program = _program(script.python, container)
    pyxis = _pyxis(container)
    return (
        _environment()
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


def directives(script: Script) -> list[tuple[str, str | int | None]]:
    """The #SBATCH lines, as (option, value); None for an option without one."""
    i = script.instance
    tasks = i.processes_per_node if script.template == "train" else 1
    wanted = [
        ("job-name", script.uuid),
        ("comment", f"tfslurm:{script.kind}:{script.object_id}"),
        ("output", str(script.folder / "logs" / "slurm.log").replace("%", "%%")),
        ("open-mode", "append"),
        ("export", "NONE"),
        ("no-requeue", None),
        ("nodes", i.nodes),
        ("ntasks-per-node", tasks),
        (
            "cpus-per-task",
            i.cpus_per_process if script.template == "train" else i.cpus_per_process * i.processes_per_node,
        ),
        ("mem", i.memory),
        ("time", i.time),
        ("partition", i.partition),
        ("account", script.account),
        ("qos", script.qos),
        ("reservation", i.reservation),
        ("constraint", i.constraint),
        *_gpus(script),
    ]
    required = {"no-requeue"}
    return [pair for pair in wanted if pair[1] is not None or pair[0] in required] + _extra(i)


def _gpus(script: Script) -> list[tuple[str, str | int | None]]:
    count, kind = script.instance.gpus_per_node, script.instance.gpu_type
    if not count:
        return []
    typed = f"{kind}:{count}" if kind else str(count)
    return [("gres", f"gpu:{typed}") if script.gpu_request == "gres" else ("gpus-per-node", typed)]


def _extra(instance: Instance) -> list[tuple[str, str | int | None]]:
    extra: list[tuple[str, str | int | None]] = []
    for option, value in instance.options.items():
        # sbatch takes any beginning of an option for the option.
        reserved = any(name.startswith(option) for name in RESERVED)
        if reserved or not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            raise ConfigurationError(
                f"instance '{instance.name}': the sbatch option '{option}' is not one that options may set",
                hint="tfslurm sets it itself: use the instance's own keys.",
            )
        if value is not False:
            extra.append((option, None if value is True else value))
    return extra


def _program(python: str, container: Container | None) -> str:
    if container and container.runtime == "apptainer":
        return shlex.join(["apptainer", "exec", *container.options, container.image, python])
    return shlex.quote(python)


def _pyxis(container: Container | None) -> str:
    if not container or container.runtime != "pyxis":
        return ""
    return shlex.join([f"--container-image={container.image}", *container.options]) + " "


def _directive(value: object) -> str:
    text = str(value)
    if FORBIDDEN.search(text):
        raise ConfigurationError(
            f"{text!r} cannot stand in an #SBATCH line", hint="Use no quotes, $ or control characters."
        )
    # Outside of quotes sbatch ends an argument at a blank, and the line at a #.
    return f'"{text}"' if re.search("[ #]", text) else text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigurationError(f"{name!r} is not a name for an environment variable")
    return name


def _quote(value: object) -> str:
    if "\0" in str(value):
        raise ConfigurationError(f"{value!r} holds a NUL")
    return shlex.quote(str(value))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(sbatch_templates.__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(quote=_quote, directive=_directive, variable=_variable)
    return environment
