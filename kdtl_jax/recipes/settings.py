"""Settings of a recipe: one frozen dataclass, whose fields are its flags and its config keys.

    @dataclass(frozen=True)
    class Settings(Data, Output):
        seeds: int = setting(5, "students per method", metavar="N", least=1, quick=2)

The class is the only description of a command: its names, types, defaults, limits and help.
`Data` and `Output` hold fields that several recipes share. The functions at the end are `parse=`
of fields written as text: each takes the text, or the value in a YAML file.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdtl_jax import transforms, trees
from kdtl_jax.datasets import FORMATS
from kdtl_jax.models import NAMED_FORMS

MODEL = f"one of: {'; '.join(NAMED_FORMS)}; or FILE.py:NAME, a model of your own"
AUGMENTATIONS = ("crop", "flip", "mixup", "cutmix")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
INT32 = 2**31 - 1
# With all the built-in digits, labels alone suffice for a small student. With ten per class they do
# not, so the teacher's contribution shows.
FEW_DIGITS = 10
POLICIES = {  # for leaves of another shape
    "error": transforms.raise_on_mismatch,
    "keep": transforms.keep_on_mismatch,
    "crop": transforms.crop,
    "pad": transforms.pad,
    "crop_or_pad": transforms.crop_or_pad,
    "uniform": transforms.select_uniform,
    "resize": transforms.resize_linear,
}


class UsageError(ValueError):
    """A setting is invalid or contradicts another: exit code 2."""


def setting(default: Any, help: str, **options: Any) -> Any:
    """A field of a settings class.

    Args:
      default: its default value.
      help: one line for `--help`, to which the default is added.
      **options: `metavar`; `short`, another name of the flag; `group`, a heading of the help;
        `least`, `above`, `most`, `below`, limits of a number; `quick`, the default under `--quick`;
        `parse`, which turns text or YAML into the value; `positional`, True or "*"; `repeat`, for a
        flag given several times; `many`, for a flag with several words.
    """
    about = {"help": help, "default": default, **options}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def positive_rate(default: float | None, help: str, **options: Any) -> Any:
    """A `setting` for a number above 0."""
    return setting(default, help, metavar="X", above=0, most=1e30, **options)


def comma_joined(value: Any) -> str:
    """`a,b`, or a list of such names, as text."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"expected text as in a,b, got {value!r:.80}")
    return value


def some_names(value: Any) -> tuple[str, ...]:
    """`names`, or none."""
    return () if value in ("", (), []) else names(value)


def height_and_width(value: Any) -> tuple[int, int] | None:
    """`64`, `48x64`, or two numbers."""
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).lower().split("x")
    sides = [int(part) for part in parts if str(part).strip().isdecimal() and len(str(part)) < 6]
    if len(sides) != len(parts) or len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"expected height and width as in 64 or 48x64, got {value!r:.80}")
    return sides[0], sides[-1]


@dataclass(frozen=True)
class Data:
    """The data to learn from."""

    data: str = setting("digits", FORMATS, metavar="DATA", group="data")
    label: str = setting(
        "label", "the label column of a table, or several as in a,b,c; or the array of labels",
        metavar="NAME,...", parse=comma_joined, group="data",
    )  # fmt: skip
    inputs: str | None = setting(
        None, "the array of inputs, or the column of images; default: the usual names",
        metavar="NAME", group="data",
    )  # fmt: skip
    target: Literal["auto", "classes", "labels", "numbers"] = setting(
        "auto", "what to predict: one class, several labels, or numbers (regression); auto: "
        "decided by the values", group="data",
    )  # fmt: skip
    missing: Literal["mean", "median", "most_frequent", "drop"] | None = setting(
        None, "what to fill a table's missing values with: mean, median or most_frequent; drop: "
        "leave out their rows; default: missing values are an error", group="data",
    )  # fmt: skip
    text_columns: Literal["one-hot"] | None = setting(
        None, "one-hot: turn text columns into one input per category; default: text columns are "
        "an error", group="data",
    )  # fmt: skip
    drop_columns: tuple[str, ...] = setting(
        (), "columns of a table to leave out", metavar="NAME,...", parse=some_names, group="data"
    )
    image_size: tuple[int, int] | None = setting(
        None, "resize images to this height and width; default: all must have the same size",
        metavar="H[xW]", parse=height_and_width, group="data",
    )  # fmt: skip
    validation: float = setting(
        0.2, "fraction held out for validation if the data has no validation split",
        metavar="SHARE", least=0, below=1, group="data",
    )  # fmt: skip
    test: float = setting(
        0.3, "fraction held out for the test if the data has no test split", metavar="SHARE",
        least=0, below=1, group="data",
    )  # fmt: skip
    split_seed: int = setting(
        0, "seed that picks the held-out rows", metavar="N", least=0, group="data"
    )


@dataclass(frozen=True)
class Output:
    """Where a run writes."""

    out: str = setting("runs/run", "the run folder", metavar="FOLDER")
    force: bool = setting(False, "overwrite an earlier run in --out")
    quick: bool = setting(False, "smoke test: few seeds and epochs unless given")


@dataclass(frozen=True)
class Resumable(Output):
    """Where a resumable run writes."""

    resume: bool = setting(False, "continue the run in --out after what it saved or finished")


def suggest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """`did you mean a, b?` with up to three of the nearest names, or "" if none is near.

    `prefix` is written before each name but not compared.
    """
    similarity = {
        candidate: difflib.SequenceMatcher(None, name, candidate).ratio()
        for candidate in candidates
    }
    threshold = max(0.6, max(similarity.values(), default=0.0) - 0.1)
    matches = sorted(
        (candidate for candidate in similarity if similarity[candidate] >= threshold),
        key=lambda x: -similarity[x],
    )
    return f"did you mean {', '.join(prefix + name for name in matches[:3])}?" if matches else ""


def names(value: Any) -> tuple[str, ...]:
    """`a,b` or a list of names."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"expected names as in a,b, got {value!r}")
    result = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not result:
        raise ValueError(f"expected at least one name, got {value!r}")
    return result


def method_names(value: Any) -> tuple[str, ...]:
    """`names` in lower case with underscores, as method names are written."""
    return names([name.lower().replace("-", "_") for name in names(value)])


def select(requested: tuple[str, ...], entries: Mapping[str, Any], command: str) -> list[Any]:
    """The entries with the requested names; `all` selects every entry.

    Raises:
      UsageError: listing unknown names, each with the nearest known names.
    """
    if requested == ("all",):
        return list(entries.values())
    unknown = []
    for name in requested:
        if name not in entries:
            nearest = difflib.get_close_matches(name, list(entries), n=4, cutoff=0.0)
            unknown.append(f"{name!r} is not a method. Nearest: {', '.join(nearest)}.")
    if unknown:
        raise UsageError(f"--methods: {' '.join(unknown)} {command} --list shows all.")
    return [entries[name] for name in requested]


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number, got {value!r}")
    try:
        result = float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {value!r:.80}") from None
    if not math.isfinite(result):
        raise ValueError(f"expected a finite number, got {value!r}")
    return result


def numbers(value: Any) -> tuple[float, ...]:
    """`1,2,4` or a list of numbers; one number is a list of one."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(map(number, parts if isinstance(parts, (list, tuple)) else [parts]))


def positive_numbers(value: Any) -> tuple[float, ...] | None:
    """`numbers`, all above 0."""
    if value is None:
        return None
    result = numbers(value)
    if not result or min(result) <= 0:
        raise ValueError(f"expected numbers above 0 as in 1e-3,1e-2, got {value!r}")
    return result


def pairs(value: Any, sign: str) -> dict[str, Any]:
    """`name<sign>value,...`, a list of these, or a mapping."""
    if isinstance(value, Mapping):
        return {str(name): x for name, x in value.items()}
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"expected name{sign}value,..., got {value!r}")
    out: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, str) and not part.strip():
            continue
        name, _, text = part.partition(sign) if isinstance(part, str) else (str(part), "", "")
        if name.strip() in out:
            raise ValueError(f"{name.strip()!r} is given twice")
        out[name.strip()] = text.strip()
    return out


def layer_numbers(value: Any) -> tuple[int, ...]:
    """`1,3,5`, or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(str(p).strip().isdecimal() for p in parts):
        raise ValueError(f"expected layers as in 1,3,5, got {value!r}")
    return tuple(int(part) for part in parts)


def term_weights(value: Any) -> dict[str, float]:
    """`kd=0.9,task=0.1`, or a mapping; `{method: {term: w}}` is `method.term=w`."""
    out: dict[str, float] = {}
    for name, text in pairs(value, "=").items():
        nested = text.items() if isinstance(text, Mapping) else [("", text)]
        for term, weight in nested:
            key = f"{name}.{term}" if term else name
            try:
                out[key] = number(weight)
            except ValueError:
                out[key] = -1.0
            if not name or out[key] < 0:
                raise ValueError(
                    f"{key}={weight} is not term=number with a number of 0 or more, "
                    "as in kd=0.9,task=0.1"
                )
    return out


def layer_pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """`student_tap:teacher_tap,...`, a mapping, or a list of pairs."""
    if isinstance(value, (list, tuple)):
        value = [":".join(pair) if isinstance(pair, (list, tuple)) else pair for pair in value]
    if isinstance(value, str):
        value = value.replace("=", ":")
    result = tuple((str(a), str(b)) for a, b in pairs(value, ":").items())
    for student, teacher in result:
        if not student or not teacher:
            raise ValueError(
                f"'{student}:{teacher}' is not student_tap:teacher_tap, as in hidden_0:hidden_1"
            )
    return result


def mesh_sizes(value: Any, axes: Sequence[str] = ("data", "fsdp")) -> dict[str, int]:
    """`data=4,fsdp=2`, or a mapping."""
    sizes = pairs(value, "=")
    for axis, size in sizes.items():
        if axis not in axes or not str(size).isdecimal() or not 0 < int(size) < 10**6:
            raise ValueError(
                f"'{axis}={size}' is not axis=size as in data=4,fsdp=2, with axes {', '.join(axes)}"
            )
    return {axis: int(size) for axis, size in sizes.items()}


def augmentations(value: Any) -> tuple[str, ...]:
    """`crop,flip,mixup=0.5`, in order of application."""
    for part in (chosen := some_names(value)):
        name, equals, strength = part.partition("=")
        if name not in AUGMENTATIONS or (equals and (name == "flip" or number(strength) <= 0)):
            raise ValueError(
                f"{part!r} is not one of {', '.join(AUGMENTATIONS)} (crop=PIXELS, mixup=ALPHA, "
                "cutmix=ALPHA)"
            )
    return chosen


def selector(text: str) -> trees.Selector:
    """`glob:PATTERN`, or a regular expression for the whole path.

    Raises:
      UsageError: if it is not a regular expression.
    """
    if text.startswith("glob:"):
        return trees.Glob(text.removeprefix("glob:"))
    return _regular_expression(text, " For shell patterns write glob:PATTERN.")


def renames(texts: Sequence[str]) -> list[tuple[str, str | None]]:
    """Rules of `transforms.transfer` from `'REGEX=>NAME'`; without a name, matches are dropped.

    Raises:
      UsageError: if a rule has no `=>`, or its left side is not a regular expression.
    """
    rules: list[tuple[str, str | None]] = []
    for text in texts:
        pattern, arrow, name = text.partition("=>")
        if not arrow:
            raise UsageError(f"--rename {text!r}: expected 'REGEX=>NAME'")
        rules.append((_regular_expression(pattern.strip()), name.strip() or None))
    return rules


def _regular_expression(text: str, hint: str = "") -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise UsageError(f"{text!r} is not a regular expression ({error}).{hint}") from None
    return text


def byte_size(value: Any) -> int | None:
    """`2GB`, `500MB`, or a number of bytes."""
    if value is None:
        return None
    text = str(value).strip().lower().removesuffix("b").removesuffix("i").strip()
    digits = text.rstrip("kmgt")
    try:
        size = int(number(digits) * UNITS[text[len(digits) :]])
    except (ValueError, KeyError):
        size = 0
    if size <= 0 or isinstance(value, bool):
        raise ValueError(f"{value!r} is not an amount as in 500MB or 2GB")
    return size


def few_or_all(chosen: int | None, data: str) -> int:
    """Examples per class: the chosen, else 10 of the built-in digits and all (0) of other data."""
    return chosen if chosen is not None else FEW_DIGITS if data == "digits" else 0


def class_range(value: Any) -> str | None:
    """`A-B`, both ends included."""
    first, _, last = str(value).partition("-")
    if value is None:
        return None
    is_range = first.isdecimal() and (not last or last.isdecimal()) and len(str(value)) <= 12
    if not is_range or int(last or first) < int(first):
        raise ValueError(f"expected A-B as in 0-4, got {value!r}")
    return str(value)
