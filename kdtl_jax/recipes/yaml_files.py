"""Writing settings as YAML, and reading YAML as plain data at a bounded cost.

Aliases, tags, repeated keys and deep nesting are errors.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kdtl_jax import _files, _text

MAX_BYTES = 128 * 2**10  # the parser reads some 100 kB per second
MAX_DEPTH = 20  # levels of nested brackets and mappings
MAX_MESSAGE = 300  # characters of a message
# Types of YAML scalars besides text; dates are text.
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
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            counts = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"the key {counts.most_common(1)[0][0]!r} is given twice")
        return mapping

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
    """Reads the mapping in a YAML file.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: with a one-line reason; the caller names the file.
    """
    with _files.regular(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse(content)


def parse(content: bytes) -> dict[Any, Any]:
    """The mapping in YAML text; errors are those of `read`."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    try:
        values = yaml.load(content.decode(), _Loader)  # a safe loader
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        message = _text.shown(" ".join(str(error).split()), MAX_MESSAGE)
        raise ValueError(f"not plain YAML data: {message}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected 'flag: value' lines, got {_text.quoted(values, 80)}")
    return values


def as_yaml(settings: Any, command: str, **overrides: Any) -> str:
    """All settings as YAML for `--config`; `overrides` replaces some."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    values |= {name: value for name, value in overrides.items() if name in values}
    fields = {name.removesuffix("_"): _plain(value) for name, value in values.items()}
    return yaml.safe_dump({"command": command, **fields}, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
