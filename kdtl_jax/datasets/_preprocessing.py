"""What turns files into a model's inputs, and its outputs into predictions, as one value.

It is computed only from the training part and stored in model files, so that other data are later
read in the same way.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kdtl_jax import _text

# What a model predicts: one class, several labels, or numbers; KINDS lists them.
Kind = Literal["classes", "labels", "numbers"]
# The values of `Kind`.
KINDS: tuple[Kind, ...] = get_args(Kind)
# What reading malformed JSON raises.
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


class Standardizer(NamedTuple):
    """Shift and scale, measured on training data; both broadcast against the values."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, data: Any) -> Any:
        """`(x - mean) / scale` of a `Dataset`'s inputs, float32."""
        centered = (data.inputs - self.mean) / self.scale
        return data._replace(inputs=centered.astype(np.float32, copy=False))


class Column(NamedTuple):
    """A column of a table that is an input: one number, or one number per category."""

    name: str
    categories: tuple[str, ...] = ()  # of text; () for numbers
    fill: float | str | None = None  # replaces a missing value; None allows none
    unit: str = ""  # of numbers whose cells have one, like "5%" and dates


class Images(NamedTuple):
    """How image files become arrays; height and width are in `Preprocessing.shape`."""

    mode: str  # Pillow's: "L", "I;16", "F", "RGB", "RGBA"
    resize: bool = False  # whether images of another size are resized or refused


class Preprocessing(NamedTuple):
    """How a model's data are read: `scaled = (inputs - mean) / scale`; `kind` says what it
    predicts."""

    kind: Kind = "classes"  # of targets: one class, several labels at once, or numbers
    names: tuple[str, ...] = ()  # of classes, labels or numbers; () if they have none
    outputs: int = 0  # number of classes, labels or numbers
    shape: tuple[int, ...] = ()  # of one input
    targets: tuple[str, ...] = ()  # the columns (or the array) that held targets
    columns: tuple[Column, ...] = ()  # of a table, in the order of the inputs
    images: Images | None = None
    scaling: Standardizer | None = None  # of inputs
    target_scaling: Standardizer | None = None  # of numbers; outputs are in these units
    inputs: str | None = None  # the array or column of inputs, if the user named it
    leaves_out: bool = False  # whether to drop rows with missing values, when targets are read, too


def preprocessing_to_json(preprocessing: Preprocessing) -> str:
    """Text for a model's file, exact to the bit."""
    known = preprocessing._asdict()
    known["columns"] = [column._asdict() for column in preprocessing.columns]
    if preprocessing.images is not None:
        known["images"] = preprocessing.images._asdict()
    for name in ("scaling", "target_scaling"):
        if (found := known[name]) is not None:
            known[name] = {"mean": _listed(found.mean), "scale": _listed(found.scale)}
    return json.dumps(known)


def preprocessing_from_json(text: str) -> Preprocessing:
    """The value that `preprocessing_to_json` wrote.

    Raises:
      ValueError: if the text does not describe one.
    """
    try:
        known = json.loads(text)
        kind, images = known["kind"], known["images"]
        if kind not in KINDS:
            raise ValueError(f"targets of kind {kind!r:.40}")
        names, outputs = _strings(known["names"]), int(known["outputs"])
        if names and len(names) != outputs:
            raise ValueError(f"{len(names)} names of {outputs} outputs")
        return Preprocessing(
            kind,
            names,
            outputs,
            tuple(map(int, known["shape"])),
            _strings(known["targets"]),
            tuple(_column(column) for column in known["columns"]),
            None if images is None else Images(str(images["mode"]), bool(images["resize"])),
            _standardizer(known["scaling"]),
            _standardizer(known["target_scaling"]),
            None if known.get("inputs") is None else str(known["inputs"]),
            bool(known.get("leaves_out", False)),
        )
    except _MALFORMED as error:
        raise ValueError(f"no description of preprocessing ({_text.shown(str(error))}).") from None


def _listed(x: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "values": x.tolist()}


def _standardizer(known: Mapping[str, Any] | None) -> Standardizer | None:
    if known is None:
        return None
    mean, scale = (
        np.asarray(known[name]["values"], np.float64 if known[name]["dtype"] == "float64"
                   else np.float32)
        for name in ("mean", "scale")
    )  # fmt: skip
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale != 0).all()):
        raise ValueError("a scale that is 0 or not finite")
    return Standardizer(mean, scale)


def _column(known: Mapping[str, Any]) -> Column:
    fill = known["fill"]
    if not isinstance(fill, (int, float, str, type(None))):
        raise ValueError("a fill value that is not a number or text")
    unit = str(known.get("unit", ""))
    return Column(str(known["name"]), _strings(known["categories"]), fill, unit)


def _strings(known: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(known, list):
        raise ValueError("names that are not a list")
    return tuple(map(str, known))
