"""YAML files laid over one another, with the file and line of every key at hand for errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from tfslurm.errors import ConfigurationError

T = TypeVar("T")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with the numbers of YAML 1.2: 12:00:00 is a text and 2e-4 a number.

    libyaml's loader where PyYAML was built with it: ten times faster, and every command loads the site's file.
    """

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))  # 010 is 10


@dataclass(frozen=True)
class Layers:
    """Mappings from several files, the later ones winning key by key."""

    files: tuple[Path, ...] = ()
    data: dict = field(default_factory=dict)
    tops: tuple[tuple[str, ...], ...] = ((),)
    """Where `data` stands in the files; several places where one was laid over another."""

    @classmethod
    def load(cls, *files: Path) -> Layers:
        """Read `files` in order; the ones that do not exist are passed over.

        Raises ConfigurationError for a file that is not YAML, or whose top is not a mapping.
        """
        found, data = [], {}
        for file in files:
            layer = _read(file)
            if layer is not None:
                found.append(file)
                data = _merge(data, layer)
        return cls(tuple(found), data)

    def overlaid(self, below: tuple[str, ...], above: tuple[str, ...]) -> Layers:
        """The mapping at `above` laid over the one at `below`; either may be missing.

        Raises ConfigurationError where one is something else.
        """
        for keys in (below, above):
            if not isinstance(found := _at(self.data, keys), dict | None):
                raise self._located(f"Expected `object`, got `{type(found).__name__}`", keys)
        data = _merge(_at(self.data, below) or {}, _at(self.data, above) or {})
        return Layers(self.files, data, (above, below))

    def convert(self, kind: type[T], *keys: str, **extra: Any) -> T:
        """The mapping under `keys` as a `kind`, a msgspec.Struct; `extra` adds fields that no file may set.

        Raises ConfigurationError naming file, line and key.
        """
        data = _at(self.data, keys)
        try:
            if not isinstance(data, dict):
                raise msgspec.ValidationError(f"Expected `object`, got `{type(data).__name__}`")
            return msgspec.convert({**data, **extra}, kind)
        except msgspec.ValidationError as error:
            raise self._located(str(error), keys) from None

    def origin(self, *keys: str) -> str:
        """`file:line` of the layer that sets the value at `keys`, or "default" where none does."""
        for top in self.tops:
            for file in reversed(self.files):
                line = _line(file, (*top, *keys))
                if line:
                    return f"{file}:{line}"
        return "default"

    def _located(self, message: str, keys: tuple[str, ...]) -> ConfigurationError:
        text, _, path = message.partition(" - at `$")
        below = tuple(re.findall(r"\.([\w-]+)", path))
        unknown = re.search(r"unknown field `([^`]+)`", text)
        key = (*keys, *below, *([unknown[1]] if unknown else []))
        while key and (origin := self.origin(*key)) == "default" and len(key) > len(keys):
            key = key[:-1]
        name = ".".join((*keys, *below)) or "the top"
        said = f"unknown key '{unknown[1]}'" if unknown else text[0].lower() + text[1:].replace("`", "'")
        return ConfigurationError(f"{origin if key else self.files[-1]}: {name}: {said}")


def _read(file: Path) -> dict | None:
    try:
        data = yaml.load(file.read_bytes(), Loader)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigurationError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigurationError(f"{file}:1: expected keys and values, got {type(data).__name__}")
    return data


def _at(data: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _line(file: Path, keys: tuple[str, ...]) -> int | None:
    node = yaml.compose(file.read_bytes(), Loader)
    line = 0
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        found = next((pair for pair in pairs if pair[0].value == key), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line
