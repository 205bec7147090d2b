"""`--config file.yaml`: every flag is a key; data only, and nothing unknown is accepted.

A flag on the command line wins over the file, the file over the default. `--quick` has defaults of
its own.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kdtl_jax.recipes.settings import UsageError

# flag: what the library suggests, and how the command says it
_SPOKEN = (
    (
        "on_mismatch",
        "on_mismatch=: transforms.keep_on_mismatch, crop, pad, uniform, resize or a function",
        "--on-mismatch keep, crop, pad, uniform or resize",
    ),
    ("drop", "a rename to None", "--drop"),
    ("drop", "the rule (path, None)", "--drop"),
)
_OWN = ("help", "config", "print_config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command has."""
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with flags as keys, e.g. seeds: 8"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as YAML and exit"
    )


def add_quick(parser: argparse.ArgumentParser, what: str, **defaults: Any) -> None:
    """`--quick`: other defaults for some flags; what is said explicitly still wins."""
    parser.add_argument("--quick", action="store_true", help=f"{what}: a smoke test")
    parser.set_defaults(when_quick=defaults)


def resolve(
    parser: argparse.ArgumentParser,
    command: argparse.ArgumentParser,
    argv: Sequence[str],
    args: argparse.Namespace,
) -> argparse.Namespace:
    """The arguments again, with the values of `--quick` and of the file as defaults.

    Raises:
      UsageError: if the file cannot be read, is no mapping, or a key or value is wrong.
    """
    values = {} if args.config is None else load(Path(args.config), command)
    if getattr(args, "quick", False) or values.get("quick", False):
        values = {**getattr(args, "when_quick", {}), **values}
    given = {
        name
        for name, action in _flags(command).items()
        if isinstance(action, argparse._AppendAction) and getattr(args, name)
    }  # argparse would append to the file's list what should replace it
    command.set_defaults(**{name: value for name, value in values.items() if name not in given})
    return parser.parse_args(argv)


def load(path: Path, command: argparse.ArgumentParser) -> dict[str, Any]:
    """`{flag: value}` from a YAML file, checked against the command's flags.

    Raises:
      UsageError: naming the file, the key and the nearest flags.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: not YAML data: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected 'flag: value' lines, got {values!r}")
    flags = _flags(command)
    out = {}
    for key, value in values.items():
        if key in ("command", "action") and str(value) in command.prog.split():
            continue  # as --print-config writes it
        name = str(key).replace("-", "_")
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=3, cutoff=0.4) or sorted(flags)
            raise UsageError(
                f"--config {path}: unknown key {key!r}; did you mean {', '.join(near)}?"
            )
        out[name] = _value(path, flags[name], value)
    return out


def dump(args: argparse.Namespace) -> str:
    """All settings of a command as YAML that `--config` reads back."""
    return yaml.safe_dump(settings(args), sort_keys=False, allow_unicode=True)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All settings of a command as plain data."""
    hidden = {*_OWN, "module", "version", "when_quick"}
    return {name: value for name, value in vars(args).items() if name not in hidden}


def unknown_flag(flag: str, command: argparse.ArgumentParser) -> str:
    """The message for a flag that does not exist."""
    known = [text for action in command._actions for text in action.option_strings]
    near = difflib.get_close_matches(flag.split("=")[0], known, n=1, cutoff=0.5)
    return f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "")


def spoken(message: str, args: argparse.Namespace) -> str:
    """A message of the library with the command's flags for the arguments they are in Python."""
    known = settings(args)

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups(default="")
        return f"--{name.replace('_', '-')} {value}".rstrip() if name in known else found[0]

    for name, python, here in _SPOKEN:
        message = message.replace(python, here) if name in known else message
    message = re.sub(r"Glob\((?:pattern=)?'([^']*)'\)", r"'glob:\1'", message)
    return re.sub(r"\b(\w+)=(?:'(\w+)'|(?![^\s,.:;)]))", flag, message)


def _flags(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in command._actions if action.dest not in _OWN}


def _value(path: Path, action: argparse.Action, value: Any) -> Any:
    """A YAML value as its flag would have parsed it.

    Lists are comma-separated text to a flag; mappings `name=value` pairs, `outer.name=value` where
    they are nested.
    """
    where = f"--config {path}: {action.dest}"
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise UsageError(f"{where}: expected true or false, got {value!r}")
        return value
    if value is None:
        return None
    if isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [value]
        return [_item(where, action, item) for item in items]
    return _item(where, action, value)


def _item(where: str, action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, dict) and action.type is None):
        raise UsageError(f"{where}: expected one value or a list, got {value!r}")
    parts = _pairs(value) if isinstance(value, dict) else value
    text = ",".join(map(str, parts)) if isinstance(parts, list) else str(parts)
    if action.choices is not None and text not in action.choices:
        raise UsageError(f"{where}: expected one of {', '.join(action.choices)}, got {text!r}")
    try:
        return action.type(text) if callable(action.type) else text
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{where}: {text!r} is no valid value ({error})") from None


def _pairs(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for name, value in mapping.items():
        nested = isinstance(value, dict)
        out += _pairs(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}={value}"]
    return out
