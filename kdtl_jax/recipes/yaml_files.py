"""Settings written as YAML; YAML read as plain data at a bounded cost.

No aliases, tags, repeated keys or deep nesting are read.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kdtl_jax import _files, _text

BYTES = 128 * 2**10  # the parser reads some 100 kB per second
DEEPEST = 20  # levels of nested brackets and mappings
LONGEST = 300  # characters of a message
# What a YAML scalar may be other than text; dates are text.
SCALARS = ("bool", "int", "float", "null", "merge")


class _Loader(yaml.SafeLoader):
    """Plain YAML: aliases, tags, repeated keys and deep nesting are errors."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError("tags (!!name) are not read")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            counts = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"the key {counts.most_common(1)[0][0]!r} is given twice")
        return found

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 40:
            raise yaml.YAMLError(f"an integer of {len(node.value)} digits")
        return super().construct_yaml_int(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in known if tag.rpartition(":")[2] in SCALARS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: with a one-line reason; the caller names the file.
    """
    with _files.regular(path).open("rb") as file:
        content = file.read(BYTES + 1)
    return parse(content)


def parse(content: bytes) -> dict[Any, Any]:
    """The mapping in YAML text; errors are those of `read`."""
    if len(content) > BYTES:
        raise ValueError(f"larger than {BYTES:,} bytes")
    try:
        values = yaml.load(content.decode(), _Loader)  # a safe loader
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = _text.shown(" ".join(str(error).split()), LONGEST)
        raise ValueError(f"not plain YAML data: {said}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected 'flag: value' lines, got {_text.quoted(values, 80)}")
    return values


def plain(settings: Any) -> dict[str, Any]:
    """All settings as data that YAML and JSON can hold."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def as_yaml(settings: Any, command: str, **instead: Any) -> str:
    """All settings as YAML that `--config` reads back; `instead` overrides some."""
    known = plain(settings)
    known |= {name: value for name, value in instead.items() if name in known}
    named = {name.removesuffix("_"): value for name, value in known.items()}
    return yaml.safe_dump({"command": command, **named}, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(found) for name, found in value.items()}
    return [_plain(found) for found in value] if isinstance(value, (list, tuple)) else value
