"""Parses the command line and a YAML file into a recipe's `Settings`.

A flag on the command line takes precedence over the file, and the file over the default; `--quick`
has its own defaults. The file is plain data: no tags, aliases, repeated keys or unknown keys.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdtl_jax._text import quoted, shown
from kdtl_jax.recipes import yaml_files
from kdtl_jax.recipes.settings import INT32, UsageError, number, suggest

LONGEST = 300  # characters of a message's line
MOST_UNKNOWN = 8  # flags or keys named in one message
# Names that other programs use for a setting.
OTHER_WORDS = {
    "model": ("student", "teacher", "encoder"),
    "net": ("student", "teacher", "model"),
    "output": ("out", "write"),
    "out": ("write",),
    "save": ("out", "write"),
    "to": ("format",),
    "seq-len": ("length",),
    "max-length": ("length",),
    "temperature": ("grid",),
}
# Flags that all commands share, which are not settings of the recipe.
SWITCHES = {
    "--print-config": "print all settings as YAML and exit",
    "--debug": "show the traceback of an error",
    "--no-compilation-cache": (
        "recompile everything instead of keeping programs in the user's cache folder"
    ),
}
DEVICES = ("device", "gpu", "cuda", "tpu", "cpu", "accelerator")


def parse(
    words: str, summary: str, module: Any, argv: Sequence[str]
) -> tuple[Any, argparse.Namespace]:
    """The settings of a command, and the flags that all commands share.

    Args:
      words: its name, "distill" or "params scale".
      summary: its line in the table, for the help.
      module: with `Settings` and `EXAMPLES`.
      argv: words after the command's name.

    Raises:
      UsageError: in one line, naming the flag or the file's key.
      SystemExit: with code 0 after `--help`.
    """
    fields = {field.name: field for field in dataclasses.fields(module.Settings)}
    parser = _parser(words, summary, module, fields)
    places = [name for name, field in fields.items() if "positional" in field.metadata]
    _refuse_unknown(fields, places, argv)
    try:
        flags, extra = _read(parser, places, argv)
    except argparse.ArgumentError as error:
        message = str(error).removeprefix("argument ")
        message = message.replace(": ignored explicit argument ", ": takes no value, got ")
        raise UsageError(_one_line(message)) from None
    if extra:
        raise UsageError(_one_line(f"unrecognized arguments: {' '.join(extra)}"))
    values = {}
    if flags.config is not None:
        values = load(Path(flags.config), fields, words)
        values = _typed(module.Settings, fields, values, f"--config {flags.config}: ")
    values |= {name: value for name, value in vars(flags).items() if name in fields}
    default = "quick" if values.get("quick") else "default"
    settings = {}
    for name, field in fields.items():
        value = field.metadata.get(default, field.metadata["default"])
        settings[name] = _value(field, values.get(name, value), "--")
    return module.Settings(**settings), flags


def read_yaml(path: Path, flag: str) -> dict[Any, Any]:
    """A YAML mapping as plain data: bounded, without aliases, tags or repeated keys.

    Raises:
      UsageError: naming the flag and the file.
    """
    try:
        return yaml_files.read(path)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{flag} {path}: {error}") from None


def load(path: Path, fields: Mapping[str, Any], words: str) -> dict[str, Any]:
    """`{field: value}` from a YAML file.

    Raises:
      UsageError: naming the file, the key and the nearest known ones.
    """
    values = read_yaml(path, "--config")
    out, unknown = {}, []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name += "_" * (name not in fields and f"{name}_" in fields)
        if key == "command" and name not in fields:
            if value != words:
                raise UsageError(f"--config {path}: written by kdtl {value}, not kdtl {words}")
            continue
        if name not in fields:
            unknown.append((quoted(str(key)), _suggestion(name, fields)))
        if name in out:
            raise UsageError(f"--config {path}: the key {name!r} is given twice")
        out[name] = value
    if unknown:
        raise UsageError(f"--config {path}: {_unknown_message('unknown key', unknown)}")
    return out


def _parser(
    words: str, summary: str, module: Any, fields: Mapping[str, Any]
) -> argparse.ArgumentParser:
    settings = module.Settings
    parser = argparse.ArgumentParser(
        prog=f"kdtl {words}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Examples:\n{module.EXAMPLES.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that a flag that is not given stands nowhere
    )
    hints, groups = get_type_hints(settings), {}
    for name, field in fields.items():
        title = field.metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        _add(groups[title], name, hints[name], field.metadata)
    group = parser.add_argument_group("all commands")
    group.add_argument(
        "--config", metavar="FILE", default=None, help="a YAML file with flags as keys"
    )
    for flag, text in SWITCHES.items():
        group.add_argument(flag, action="store_true", default=False, help=text)
    return parser


def _read(
    parser: argparse.ArgumentParser, places: Sequence[str], argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The words as flags and names of files, which may stand between flags, and what is neither.

    After "--", names may begin with a dash.
    """
    before, names = _split_at_dashes(argv)
    words: list[str] = []
    for word in before:
        # argparse takes -1e-3 and -1,2 for flags.
        is_value = words and words[-1].startswith("--") and re.match(r"-\.?\d", word)
        words[-1:] = [f"{words[-1]}={word}"] if is_value else [*words[-1:], word]
    flags, extra = parser.parse_known_intermixed_args(words)
    if not names or extra:
        return flags, [*extra, *names]
    earlier = []
    for place in places:
        value = getattr(flags, place, [])
        earlier += value if isinstance(value, list) else [value]
    flags, extra = parser.parse_known_args(["--", *earlier, *names], flags)
    return flags, [word for word in extra if word != "--"]


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first "--", and those after it."""
    place = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def _add(group: Any, name: str, hint: Any, metadata: Mapping[str, Any]) -> None:
    description = metadata["help"]
    default_text = _default_text(metadata["default"])
    if default_text and "default:" not in description:
        description = f"{description}; default: {default_text}"
    options: dict[str, Any] = {"help": description.replace("%", "%%")}
    if hint is bool:
        group.add_argument(
            _flag(name), dest=name, action="store_true", default=argparse.SUPPRESS, **options
        )
        return
    if "metavar" in metadata:
        options["metavar"] = metadata["metavar"]
    if _is_typed(metadata):
        options["type"] = partial(_convert, hint)
        if chosen := _choices(hint):
            options.setdefault("metavar", f"{{{','.join(chosen)}}}")
    if metadata.get("repeat"):
        options["action"] = "append"
    if metadata.get("many"):
        options |= {"action": "extend", "nargs": "+"}
    if "positional" in metadata:
        group.add_argument(name, nargs="*" if metadata["positional"] == "*" else "?", **options)
        return
    short = [metadata["short"]] if "short" in metadata else []
    group.add_argument(_flag(name), *short, dest=name, **options)


def _is_typed(metadata: Mapping[str, Any]) -> bool:
    """Whether the type hint says how to read a setting, not its parser or its repetition."""
    return not ("parse" in metadata or metadata.get("repeat") or metadata.get("positional") == "*")


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, or of one that may be None; () for other types."""
    hints = [hint, *get_args(hint)]
    return next((get_args(each) for each in hints if get_origin(each) is Literal), ())


def _convert(hint: Any, value: Any) -> Any:
    """A word, or a value of a YAML file, as the type hint says.

    Raises:
      ArgumentTypeError: saying what was expected.
    """
    if type(None) in get_args(hint) and value in (None, "null"):
        return None
    choices, hints = _choices(hint), (hint, *get_args(hint))
    try:
        if choices:
            return _choice(choices, str(value))
        if float in hints:
            return number(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if int in hints:
        return _integer(value)
    if not isinstance(value, str) or not value:  # "" would be the current folder
        raise argparse.ArgumentTypeError(f"expected text, got {value if value else repr(value)}")
    return value


def _choice(choices: Sequence[str], value: str) -> str:
    """One of the known values, in any case and with `_` or `-`."""
    plain = {name.lower().replace("_", "-"): name for name in choices}
    choice = value.lower().replace("_", "-")
    if choice not in plain:
        message = f"expected one of {', '.join(choices)}, got {quoted(value)}"
        raise ValueError("; ".join(filter(None, (message, suggest(choice, choices)))))
    return plain[choice]


def _integer(value: Any) -> int:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    try:
        return value if is_whole else int(value if isinstance(value, str) else "")
    except ValueError:  # also for a text of thousands of digits
        message = f"expected a whole number, got {quoted(value)}"
        raise argparse.ArgumentTypeError(message) from None


def _refuse_unknown(fields: Mapping[str, Any], places: Sequence[str], words: Sequence[str]) -> None:
    known = [_flag(name) for name in fields if name not in places]
    known += [field.metadata["short"] for field in fields.values() if "short" in field.metadata]
    known += ["--help", "--config", *SWITCHES]
    words, _ = _split_at_dashes(words)
    flags = [word.partition("=")[0] for word in words]
    unknown = [
        (shown(word), _positional_hint(flag, places) or _suggestion(flag, known))
        for word, flag in zip(words, flags, strict=True)
        if flag.startswith("--") and flag != "--" and flag not in known
    ]
    if unknown:
        raise UsageError(_unknown_message("unknown argument", unknown))


def _unknown_message(kind: str, unknown: Sequence[tuple[str, str]]) -> str:
    """A message about unknown names, the first few of them with suggestions."""
    if len(unknown) == 1:
        return f"{kind} {'; '.join(filter(None, unknown[0]))}"
    names = [f"{name} ({hint})" if hint else name for name, hint in unknown[:MOST_UNKNOWN]]
    more = f" and {len(unknown) - MOST_UNKNOWN} more" if len(unknown) > MOST_UNKNOWN else ""
    return f"{kind}s {', '.join(names)}{more}"


def _positional_hint(flag: str, places: Sequence[str]) -> str:
    """A hint for a positional argument that is given as a flag."""
    name = flag.removeprefix("--").replace("-", "_")
    name = "student" if name in ("weights", "checkpoint") else name
    return f"{name.upper()} is given without a flag" if name in places else ""


def _suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean a, b?`: names that share a whole word with this one before others."""
    known = list(known)
    dashed = name.removeprefix("--").replace("_", "-")
    dashed = "learning-rate" if dashed in ("lr", "rate", "step-size") else dashed
    words = {word.rstrip("s") for word in dashed.split("-")}
    matches = [
        other
        for other in known
        if words <= {word.rstrip("s") for word in re.split("[-_]", other.strip("-_"))}
    ]
    if matches:
        # Whole words first: "weights" is nearer to "loss-weights" than to "weight-decay".
        matches.sort(key=lambda other: not set(dashed.split("-")) <= set(re.split("[-_]", other)))
        return f"did you mean {', '.join(matches[:3])}?"
    synonyms = [x for x in known if x.strip("-").replace("_", "-") in OTHER_WORDS.get(dashed, ())]
    if synonyms:
        return f"did you mean {', '.join(synonyms)}?"
    if dashed in DEVICES:
        return "JAX chooses the device: set JAX_PLATFORMS to cpu, cuda or tpu"
    if not name.startswith("--"):
        return suggest(name, known)
    return suggest(dashed, [flag.strip("-") for flag in known], "--")


def _typed(
    settings: Any, fields: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The values of a file, converted to their types."""
    hints, typed = get_type_hints(settings), {}
    for name, value in values.items():
        metadata = fields[name].metadata
        if not _is_typed(metadata):
            is_word = "parse" not in metadata and isinstance(value, str)
            typed[name] = [value] if is_word else value
            continue
        if isinstance(metadata["default"], bool):
            if not isinstance(value, bool):
                raise UsageError(f"{where}{name}: expected true or false, got {value!r:.80}")
            typed[name] = value
            continue
        if value is None and metadata["default"] is not None:
            raise UsageError(f"{where}{name}: expected a value, got null")
        if isinstance(metadata["default"], str) and type(value) in (int, float):
            value = str(value)
        try:
            typed[name] = _convert(hints[name], value)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{where}{name}: {_one_line(str(error))}") from None
    return {name: _value(fields[name], value, where) for name, value in typed.items()}


def _value(field: Any, value: Any, where: str) -> Any:
    """A value, parsed by the setting's parser and checked against its limits."""
    metadata, name = field.metadata, field.name
    label = _flag(name) if where == "--" else f"{where}{name}"
    if "parse" in metadata:
        try:
            value = metadata["parse"](value)
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{label}: {shown(str(error), 1000)}") from None
        except OSError as error:  # a path that is too long
            raise UsageError(f"{label}: {error.strerror}: {shown(value)}") from None
    if metadata.get("repeat") or metadata.get("positional") == "*":
        value = () if value is None else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
            raise UsageError(f"{label}: expected text, got {value!r:.80}")
        value = tuple(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_bounds(label, value, metadata)
    return value


def _check_bounds(label: str, value: float, metadata: Mapping[str, Any]) -> None:
    least, above = metadata.get("least"), metadata.get("above")
    most, below = metadata.get("most", INT32), metadata.get("below")
    low = (least is None or value >= least) and (above is None or value > above)
    high = value <= most and (below is None or value < below)
    if low and high:
        return
    parts = [f"above {above}"] if above is not None else []
    parts += [f"{least} or more"] if least is not None else []
    if below is not None or not high:
        parts.append(f"below {below}" if below is not None else f"at most {most}")
    raise UsageError(f"{label}: expected {', '.join(parts) or 'a number'}, got {value}")


def _flag(name: str) -> str:
    return f"--{name.removesuffix('_').replace('_', '-')}"


def _default_text(default: Any) -> str:
    """A default as written on the command line."""
    if default is None or default is False or default in ((), {}, ""):
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, dict):
        return " ".join(f"{k}={','.join(map(str, v))}" for k, v in default.items())
    return str(default)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
