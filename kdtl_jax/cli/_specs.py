"""Models and data sets named on the command line: `mlp:128,64`, `wrn-16-2`, `digits`, a file.

Shared by every command that trains or measures. The text of a model is checked when the command
line is read; files are read when the command runs.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from kdtl_jax import models
from kdtl_jax.cli._config import UsageError
from kdtl_jax.datasets import (
    Dataset,
    Splits,
    checked,
    digits,
    read_csv,
    read_idx,
    standardized,
    stratified,
)

FORMS = (
    "mlp:128,64 (hidden widths)",
    "cnn:16,32 (channels)",
    "resnet8, resnet14, resnet20, resnet32, resnet44, resnet56, resnet110",
    "resnet8x4, resnet32x4",
    "wrn-16-2 (depth, width)",
    "vit:patch=4,width=64,layers=4,heads=4,hidden=128 (these are the defaults)",
)
VIT = {"patch": 4, "width": 64, "layers": 4, "heads": 4, "hidden": 128}
# Names of (inputs, labels) in an npz, in the order in which they are looked for.
TRAIN_KEYS = (("x_train", "y_train"), ("train_images", "train_labels"))
TEST_KEYS = (("x_test", "y_test"), ("test_images", "test_labels"))
VALIDATION_KEYS = (
    ("x_validation", "y_validation"),
    ("x_valid", "y_valid"),
    ("x_val", "y_val"),
    ("val_images", "val_labels"),
)
WHOLE_KEYS = (("x", "y"), ("inputs", "labels"), ("images", "labels"), ("data", "target"))
DATA_HELP = (
    "digits (embedded), an .npz (x_train, y_train, x_test, y_test, or x, y), a folder of idx files "
    "(train-images-idx3-ubyte, train-labels-…, t10k-…, .gz too), or a .csv with --label"
)


def add_data_arguments(parser: argparse.ArgumentParser, default: str = "digits") -> None:
    """`--data`, `--label`, `--validation`, `--test`, `--split-seed`; read them with `splits`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default=default, metavar="DATA", help=f"{DATA_HELP}; default: {default}"
    )
    group.add_argument(
        "--label", default="label", metavar="COLUMN", help="a CSV's label column; default: label"
    )
    group.add_argument(
        "--validation",
        type=fraction,
        default=0.2,
        metavar="SHARE",
        help="share held out for validation, where the data has none of its own; default: 0.2",
    )
    group.add_argument(
        "--test",
        type=fraction,
        default=0.3,
        metavar="SHARE",
        help="share held out for the test, where the data has none of its own; default: 0.3",
    )
    group.add_argument(
        "--split-seed", type=int, default=0, metavar="N", help="of the held-out rows; default: 0"
    )


def add_model_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, str]) -> None:
    """One flag per model, for example `{"teacher": "mlp:128,64", "student": "mlp:16"}`."""
    group = parser.add_argument_group("models", f"A MODEL is one of: {'; '.join(FORMS)}.")
    for name, default in defaults.items():
        group.add_argument(
            f"--{name}",
            type=model_text,
            default=default,
            metavar="MODEL",
            help=f"default: {default}",
        )


def splits(args: argparse.Namespace) -> Splits:
    """The data that `add_data_arguments` named, standardized by its training part."""
    return standardized(raw_splits(args))


def raw_splits(args: argparse.Namespace) -> Splits:
    """As `splits`, with the values as they are stored."""
    return read_splits(
        args.data,
        label=args.label,
        validation=args.validation,
        test=args.test,
        split_seed=args.split_seed,
    )


def dataset(
    text: str,
    *,
    label: str = "label",
    validation: float = 0.2,
    test: float = 0.3,
    split_seed: int = 0,
) -> Splits:
    """`read_splits`, standardized by the training part alone."""
    return standardized(
        read_splits(text, label=label, validation=validation, test=test, split_seed=split_seed)
    )


def read_splits(
    text: str,
    *,
    label: str = "label",
    validation: float = 0.2,
    test: float = 0.3,
    split_seed: int = 0,
) -> Splits:
    """Train, validation and test parts of the data that a text names.

    Args:
      text: `digits`; an `.npz` with `x_train`, `y_train`, `x_test`, `y_test` (and, if it has one,
        `x_validation`, `y_validation`), or with `x`, `y` alone; a folder of idx files in MNIST's
        names; a `.csv` with a header line. Other usual names of arrays are understood
        (`TRAIN_KEYS` and its neighbours).
      label: the label column of a CSV.
      validation: share of the training rows (of all rows, if there is no test part either).
      test: share of all rows, if there is no test part.
      split_seed: of the rows held out; parts keep their proportions of classes.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if there is nothing of the kind, or its contents are not what they should be.
    """
    fractions = {"validation": validation, "test": test, "seed": split_seed}
    if text == "digits":
        return stratified(digits(), **fractions)
    path = Path(text)
    if path.is_dir():
        return _from_folder(path, validation, split_seed)
    if not path.exists():
        raise ValueError(f"--data {text}: no such file or folder. Expected {DATA_HELP}.")
    if path.suffix == ".npz":
        return _from_npz(path, validation, test, split_seed)
    if path.suffix == ".csv":
        return stratified(read_csv(path, label=label), **fractions)
    raise ValueError(f"--data {text}: not recognized by its name. Expected {DATA_HELP}.")


def model(text: str, classes: int) -> nn.Module:
    """The Flax module that a text names, with `classes` outputs.

    Raises:
      UsageError: listing the forms, if the text is none of them or its numbers make no sense.
    """
    try:
        return _model(text.strip(), classes)
    except ValueError as error:
        raise UsageError(f"{text!r} is no model: {error} Expected {'; '.join(FORMS)}.") from None


def model_text(text: str) -> str:
    """`type=` of a model's flag: the text itself, once it is known to name a model."""
    try:
        model(text, 2)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def fraction(text: str) -> float:
    """`type=` of a share: a number in `[0, 1)`."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, got {text}")
    return value


def _model(text: str, classes: int) -> nn.Module:
    name, colon, rest = text.partition(":")
    if name == "mlp":
        return models.mlp(_numbers(rest), classes)
    if name == "cnn":
        return models.cnn(_numbers(rest), classes)
    if name == "vit":
        return _vit(rest, classes)
    if colon:
        raise ValueError(f"only mlp, cnn and vit take values after a colon, not {name!r}.")
    if found := re.fullmatch(r"resnet(\d+)x4", name):
        return models.resnet_x4(int(found[1]), classes)
    if found := re.fullmatch(r"resnet(\d+)", name):
        return models.resnet(int(found[1]), classes)
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return models.wide_resnet(int(found[1]), int(found[2]), classes)
    raise ValueError("its name is not known.")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not a list of whole numbers.")
    return [int(part) for part in parts]


def _vit(text: str, classes: int) -> nn.Module:
    chosen = dict(VIT)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in VIT or not value.strip().isdecimal() or int(value) < 1:
            raise ValueError(f"{part!r} is not one of {', '.join(VIT)} with a whole number.")
        chosen[name.strip()] = int(value)
    if chosen["width"] % chosen["heads"]:
        raise ValueError(f"width {chosen['width']} does not divide into {chosen['heads']} heads.")
    return models.ViT(
        width=chosen["width"],
        layers=chosen["layers"],
        heads=chosen["heads"],
        hidden=chosen["hidden"],
        patch=chosen["patch"],
        classes=classes,
    )


def _from_npz(path: Path, validation: float, test: float, seed: int) -> Splits:
    arrays = _npz_arrays(path)
    train = _pair(path, arrays, TRAIN_KEYS, None)
    if train is None:
        whole = _pair(path, arrays, WHOLE_KEYS, None)
        if whole is None:
            raise ValueError(
                f"{path}: has no training data. Expected arrays x_train, y_train, x_test, y_test, "
                f"or x, y; it has {sorted(arrays) or 'none'}."
            )
        return stratified(whole, validation=validation, test=test, seed=seed)
    held = _pair(path, arrays, VALIDATION_KEYS, train.classes)
    final = _pair(path, arrays, TEST_KEYS, train.classes)
    return _completed(train, held, final, validation, test, seed)


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("a single array; use np.savez(path, x=, y=)")
            return {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: not a readable npz ({error}).") from None
    except Exception as error:  # zipfile and zlib have errors of their own for damaged files
        raise ValueError(f"{path}: a damaged npz ({error}).") from None


def _pair(
    path: Path, arrays: dict[str, np.ndarray], keys: Any, classes: int | None
) -> Dataset | None:
    for inputs, labels in keys:
        if inputs in arrays and labels in arrays:
            x = arrays[inputs]
            named = f"{path}: {inputs}"
            data = checked(named, x[..., None] if x.ndim == 3 else x, arrays[labels], classes)
            return data._replace(name=path.name)
        if inputs in arrays and inputs.startswith("x"):
            raise ValueError(f"{path}: has {inputs!r} but not {labels!r}; it has {sorted(arrays)}.")
    return None


def _from_folder(path: Path, validation: float, seed: int) -> Splits:
    train = read_idx(_idx(path, "train", "images"), _idx(path, "train", "labels"))
    test = read_idx(
        _idx(path, "t10k", "images"), _idx(path, "t10k", "labels"), classes=train.classes
    )
    named = (part._replace(name=path.name) for part in (train, test))
    train, test = named
    return _completed(train, None, test, validation, 0.0, seed)


def _idx(folder: Path, part: str, kind: str) -> Path:
    """The one file of a part: `train-images-idx3-ubyte`, `train-images.idx3-ubyte.gz`, …"""
    found = sorted(folder.glob(f"{part}-{kind}*"))
    if part == "t10k" and not found:
        found = sorted(folder.glob(f"test-{kind}*"))
    if not found:
        there = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(
            f"--data {folder}: has no {part}-{kind}-idx file (.gz or not); it has "
            f"{there or 'nothing'}. Expected MNIST's four files."
        )
    return found[0]


def _completed(
    train: Dataset,
    held: Dataset | None,
    final: Dataset | None,
    validation: float,
    test: float,
    seed: int,
) -> Splits:
    """All three parts; what the data lacks is taken out of its training part."""
    parts = stratified(
        train,
        validation=validation if held is None else 0.0,
        test=test if final is None else 0.0,
        seed=seed,
    )
    found = Splits(
        parts.train,
        parts.validation if held is None else held,
        parts.test if final is None else final,
    )
    shapes = [part.inputs.shape[1:] for part in found]
    if len(set(shapes)) > 1:
        raise ValueError(f"{train.name}: parts have examples of different shapes, {shapes}.")
    return found
