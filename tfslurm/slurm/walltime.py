"""Times as Slurm writes them. https://slurm.schedmd.com/sbatch.html#OPT_time"""

from __future__ import annotations

import re

_DAYS = re.compile(r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?")
_CLOCK = re.compile(r"((?P<h>\d+):(?=\d+:\d))?(?P<m>\d+)(:(?P<s>\d+))?")


def seconds(text: str | int) -> int | None:
    """`90`, `90:00`, `1:30:00`, `1-2`, `1-2:30` or `1-2:30:00` in seconds; None for what has no limit, or is none."""
    found = _DAYS.fullmatch(str(text).strip()) or _CLOCK.fullmatch(str(text).strip())
    if not found:
        return None
    parts = {key: int(value or 0) for key, value in found.groupdict().items()}
    return ((parts.get("d", 0) * 24 + parts["h"]) * 60 + parts["m"]) * 60 + parts["s"]
