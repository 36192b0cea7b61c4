"""The #SBATCH lines of a script. https://slurm.schedmd.com/sbatch.html"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tfslurm.errors import ConfigurationError
from tfslurm.settings import Instance
from tfslurm.slurm import walltime

if TYPE_CHECKING:
    from tfslurm.slurm.templates import Script

Option = tuple[str, str | int | None]
"""None for an option without a value."""

RESERVED = frozenset(
    "job-name comment output error open-mode export export-file get-user-env requeue no-requeue no-kill nodes ntasks "
    "ntasks-per-node cpus-per-task mem time time-min partition account qos reservation constraint gres gpus-per-node "
    "array chdir signal begin hold deadline parsable wrap wait dependency test-only clusters uid gid input "
    "help usage version".split()
)
"""Options that the platform sets itself, or that would break what it relies on."""

EXCLUDE = "exclude"
"""The one option that both may set: the nodes of the instance, and those that failed under the job."""

FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\"'\\`$]")


def directives(script: Script) -> list[Option]:
    """What the script asks of Slurm.

    Raises ConfigurationError for an option of the instance that is not for it to set.
    """
    i, trains = script.instance, script.template == "train"
    wanted = [
        ("job-name", script.uuid),
        ("comment", f"tfslurm:{script.kind}:{script.object_id}"),
        ("output", str(script.folder / "logs" / "slurm.log").replace("%", "%%")),
        ("open-mode", "truncate" if script.template == "sync" else "append"),
        ("export", "NONE"),
        ("requeue" if _comes_back(script) else "no-requeue", None),
        ("nodes", i.nodes if script.template != "sync" else 1),
        ("ntasks-per-node", i.processes_per_node if trains else 1),
        ("cpus-per-task", i.cpus_per_process if trains else i.cpus_per_process * i.processes_per_node),
        ("mem", i.memory),
        ("time", i.time),
        ("partition", i.partition),
        ("account", script.account),
        ("qos", script.qos),
        ("reservation", i.reservation),
        ("constraint", i.constraint),
        *_gpus(script),
        ("signal", _signal(script)),
        ("array", script.array.indices if script.array else None),
        ("dependency", "singleton" if script.template == "sync" else None),
        (EXCLUDE, _excluded(script)),
    ]
    return [pair for pair in wanted if pair[1] is not None or pair[0].endswith("requeue")] + _extra(i)


def _comes_back(script: Script) -> bool:
    """Whether Slurm may start it again by itself; imports and endpoints are submitted anew."""
    return script.template == "sync" or (script.template == "train" and script.requeue)


def _signal(script: Script) -> str | None:
    """B: is the batch shell alone; a job of a few minutes gets at least half of them."""
    if script.template != "train" or not script.leave_seconds:
        return None
    limit = walltime.seconds(script.instance.time)
    return f"B:USR2@{min(script.leave_seconds, limit // 2) if limit else script.leave_seconds}"


def _excluded(script: Script) -> str | None:
    own = script.instance.options.get(EXCLUDE)
    return ",".join(dict.fromkeys([*([str(own)] if own else []), *script.exclude])) or None


def _gpus(script: Script) -> list[Option]:
    count, kind = script.instance.gpus_per_node, script.instance.gpu_type
    if not count:
        return []
    typed = f"{kind}:{count}" if kind else str(count)
    return [("gres", f"gpu:{typed}") if script.gpu_request == "gres" else ("gpus-per-node", typed)]


def _extra(instance: Instance) -> list[Option]:
    extra: list[Option] = []
    for option, value in instance.options.items():
        if option == EXCLUDE and isinstance(value, str):
            continue
        # sbatch takes any beginning of an option for the option.
        reserved = any(name.startswith(option) for name in (*RESERVED, EXCLUDE))
        if reserved or not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            raise ConfigurationError(
                f"instance '{instance.name}': the sbatch option '{option}' is not one that options may set",
                hint="tfslurm sets it itself: use the instance's own keys.",
            )
        if value is not False:
            extra.append((option, None if value is True else value))
    return extra


def written(value: object) -> str:
    """A value as it stands in an #SBATCH line. Raises ConfigurationError for one that could end the line or a quote."""
    text = str(value)
    if FORBIDDEN.search(text):
        raise ConfigurationError(
            f"{text!r} cannot stand in an #SBATCH line", hint="Use no quotes, $ or control characters."
        )
    # Outside of quotes sbatch ends an argument at a blank, and the line at a #.
    return f'"{text}"' if re.search("[ #]", text) else text
