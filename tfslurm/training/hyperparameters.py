"""The six numbers that a user submits: their defaults, ranges and names."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tfslurm.errors import InvalidError
from tfslurm.settings import HyperparameterRanges, Range
from tfslurm.training.config import Hyperparameters

FIELDS = {field.name: field.type for field in msgspec.structs.fields(Hyperparameters)}
"""Each hyperparameter's name and type."""


def resolve(
    given: Mapping[str, float | None], ranges: HyperparameterRanges, *, longest: int | None = None
) -> Hyperparameters:
    """The hyperparameters of a job: what was given, and the model's defaults for the rest.

    `longest` is the most tokens that the base model takes. Raises InvalidError for what is out of range, all of it.
    """
    wrong, values = [], {}
    for name, kind in FIELDS.items():
        allowed = _bounded(getattr(ranges, name), longest if name == "max_seq_length" else None)
        value = given.get(name)
        value = kind(allowed.default if value is None else value)
        if not allowed.minimum <= value <= allowed.maximum:
            wrong.append(f"{name} {value:g} is not between {allowed.minimum:g} and {allowed.maximum:g}")
        values[name] = value
    if wrong:
        raise InvalidError("; ".join(wrong), hint="`tfslurm model show NAME` lists what each base model allows.")
    return Hyperparameters(**values)


def _bounded(allowed: Range, longest: int | None) -> Range:
    if longest is None or longest >= allowed.maximum:
        return allowed
    return Range(default=min(allowed.default, longest), minimum=allowed.minimum, maximum=longest)
