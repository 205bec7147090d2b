"""How files become a model's inputs, and its outputs become predictions.

A `Preprocessing` is measured on the training part alone and stored in model files, so that other
data are later read in the same way.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kdtl_jax import _text

# What a model predicts: one class, several labels, or numbers.
Kind = Literal["classes", "labels", "numbers"]
# All values of `Kind`.
KINDS: tuple[Kind, ...] = get_args(Kind)
# The errors raised on malformed JSON.
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
    """How to read a model's data, and what the model predicts.

    Inputs are scaled as `(inputs - mean) / scale`.
    """

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
    leaves_out: bool = False  # whether labeled rows with missing values are dropped


def preprocessing_to_json(preprocessing: Preprocessing) -> str:
    """JSON text for a model's file; floats survive to the bit."""
    record = preprocessing._asdict()
    record["columns"] = [column._asdict() for column in preprocessing.columns]
    if preprocessing.images is not None:
        record["images"] = preprocessing.images._asdict()
    for name in ("scaling", "target_scaling"):
        if (scaling := record[name]) is not None:
            record[name] = {
                field: {"dtype": str(x.dtype), "values": x.tolist()}
                for field, x in scaling._asdict().items()
            }
    return json.dumps(record)


def preprocessing_from_json(text: str) -> Preprocessing:
    """Reads the text that `preprocessing_to_json` wrote.

    Raises:
      ValueError: if the text does not describe one.
    """
    try:
        record = json.loads(text)
        kind, images = record["kind"], record["images"]
        if kind not in KINDS:
            raise ValueError(f"targets of kind {kind!r:.40}")
        names, outputs = _strings_from_json(record["names"]), int(record["outputs"])
        if names and len(names) != outputs:
            raise ValueError(f"{len(names)} names of {outputs} outputs")
        return Preprocessing(
            kind,
            names,
            outputs,
            tuple(map(int, record["shape"])),
            _strings_from_json(record["targets"]),
            tuple(_column_from_json(column) for column in record["columns"]),
            None if images is None else Images(str(images["mode"]), bool(images["resize"])),
            _standardizer_from_json(record["scaling"]),
            _standardizer_from_json(record["target_scaling"]),
            None if record.get("inputs") is None else str(record["inputs"]),
            bool(record.get("leaves_out", False)),
        )
    except _MALFORMED as error:
        raise ValueError(f"no description of preprocessing ({_text.shown(str(error))}).") from None


def _standardizer_from_json(record: Mapping[str, Any] | None) -> Standardizer | None:
    if record is None:
        return None
    arrays = [record[name] for name in Standardizer._fields]
    dtypes = [np.float64 if x["dtype"] == "float64" else np.float32 for x in arrays]
    mean, scale = (np.asarray(x["values"], t) for x, t in zip(arrays, dtypes, strict=True))
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale != 0).all()):
        raise ValueError("a scale that is 0 or not finite")
    return Standardizer(mean, scale)


def _column_from_json(record: Mapping[str, Any]) -> Column:
    fill = record["fill"]
    if not isinstance(fill, (int, float, str, type(None))):
        raise ValueError("a fill value that is not a number or text")
    unit = str(record.get("unit", ""))
    return Column(str(record["name"]), _strings_from_json(record["categories"]), fill, unit)


def _strings_from_json(strings: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(strings, list):
        raise ValueError("names that are not a list")
    return tuple(map(str, strings))
