"""Argument checks: all error messages about arrays are written here.

Every message names the argument, the expected and the received value (with its shape), and the
repair. Shapes and dtypes are always known; *values* are checked only if they are concrete, so every
check is free under `jit`.
"""

import difflib
import itertools
import numbers
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def described(**arrays: Any) -> str:
    """`student[4, 10], teacher[4, 1, 10]`: names with shapes, for messages."""
    return ", ".join(f"{name}{list(np.shape(array))}" for name, array in arrays.items())


def arrays(**given: Any) -> None:
    """Raises TypeError for values without a dtype: None, text, a dict of outputs, an object."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be an array, got a mapping with the keys {list(value)[:4]}. "
                f'Pass one of its entries, e.g. {name}["logits"].'
            )
        if not (hasattr(value, "dtype") or isinstance(value, (numbers.Number, list, tuple))):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}.")


def same_shape(**given: Any) -> None:
    """Raises ValueError unless all arrays have one shape; nothing is ever broadcast."""
    arrays(**given)
    if len({np.shape(array) for array in given.values()}) > 1:
        raise ValueError(
            f"arguments must have one shape, got {described(**given)}. "
            "Nothing is broadcast: reshape, pool or project one side first."
        )


def floating(**given: Any) -> None:
    """Raises TypeError unless every array is real floating point."""
    arrays(**given)
    for name, array in given.items():
        if isinstance(array, (list, tuple)):
            raise TypeError(
                f"{name} must be an array, got {type(array).__name__}. "
                f"Use jnp.asarray({name}) of numbers."
            )
        dtype = jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating point, got {dtype}{list(np.shape(array))}. "
                f"Convert it first, e.g. {name}.astype(jnp.float32)."
            )


def rank(at_least: int, at_most: int | None = None, **given: Any) -> None:
    """Raises ValueError unless `at_least <= ndim <= at_most` (no upper bound if None)."""
    arrays(**given)
    for name, array in given.items():
        ndim = np.ndim(array)
        if ndim < at_least or (at_most is not None and ndim > at_most):
            if at_most is None:
                expected = f"at least {at_least}"
            else:
                expected = f"{at_least}" if at_most == at_least else f"{at_least} to {at_most}"
            raise ValueError(
                f"{name} must have {expected} dimension(s), got {described(**{name: array})}."
            )


def nonempty(**arrays: Any) -> None:
    """Raises ValueError if an array has no elements: a mean over nothing is NaN."""
    for name, array in arrays.items():
        if np.size(array) == 0:
            raise ValueError(
                f"{name} is empty, got {described(**{name: array})}. Skip empty batches."
            )


def same_batch(**given: Any) -> None:
    """Raises ValueError unless all leading dimensions agree."""
    arrays(**given)
    if len({np.shape(array)[:1] for array in given.values()}) > 1:
        raise ValueError(
            f"arguments must have one batch size (leading dimension), got {described(**given)}."
        )


def concrete(value: Any) -> np.ndarray | None:
    """The value as NumPy, or None if it is traced (then only its shape is known)."""
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, concrete or abstract."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def key(**given: Any) -> None:
    """Raises TypeError unless every value is one PRNG key, typed or of the older uint32 form."""
    for name, value in given.items():
        shape, is_old = np.shape(value), getattr(value, "dtype", None) == np.uint32
        if (is_key(value) and shape) or (is_old and len(shape) > 1):
            raise TypeError(
                f"{name} must be one PRNG key, got {list(shape)} of them. Call the function once "
                f"per key (jax.vmap), or take one: {name}[0]."
            )
        if not (is_key(value) or (is_old and len(shape) == 1)):
            got = described(**{name: value}) if hasattr(value, "dtype") else f"{value!r:.80}"
            raise TypeError(f"{name} must be a PRNG key such as jax.random.key(0), got {got}.")


def _real_number(name: str, value: Any) -> np.ndarray | None:
    """`concrete` of numbers; raises TypeError for text, None, True and other non-numbers."""
    array = concrete(value)
    if array is not None and array.dtype.kind in ("USO" if array.ndim else "USOb"):
        raise TypeError(f"{name} must be a number, got {value!r:.80}.")
    if array is not None and array.dtype.kind == "c":
        raise TypeError(f"{name} must be real, got {value!r:.80}.")
    return array


def finite(**scalars: Any) -> None:
    """Raises ValueError unless every (concrete) value is finite."""
    _require("be finite", np.isfinite, scalars)


def positive(**scalars: Any) -> None:
    """Raises ValueError unless every (concrete) value is finite and > 0."""
    _require("be finite and > 0", lambda x: (x > 0) & np.isfinite(x), scalars)


def non_negative(**arrays: Any) -> None:
    """Raises ValueError unless every (concrete) value is finite and >= 0."""
    _require("be finite and >= 0", lambda x: (x >= 0) & np.isfinite(x), arrays)


def within(low: float, high: float, **scalars: Any) -> None:
    """Raises ValueError unless every (concrete) value lies in `[low, high]`."""
    _require(f"lie in [{low}, {high}]", lambda x: (x >= low) & (x <= high), scalars)


def _require(need: str, holds: Callable[[np.ndarray], Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        array = _real_number(name, value)
        if array is not None and not bool(np.all(holds(array))):
            raise ValueError(f"{name} must {need}, got {_short(array)}.")


def ordered(**bounds: Any) -> None:
    """Raises ValueError if a (concrete) bound is above the next one."""
    arrays = {name: concrete(value) for name, value in bounds.items()}
    for (low, a), (high, b) in itertools.pairwise(arrays.items()):
        if a is not None and b is not None and bool(np.any(a > b)):
            raise ValueError(f"{low} must be at most {high}, got {_short(a)} and {_short(b)}.")


def scalar(**scalars: Any) -> None:
    """Raises ValueError unless every value has shape `[]`, TypeError unless it is real."""
    for name, value in scalars.items():
        _real_number(name, value)
        if jnp.iscomplexobj(value):
            raise TypeError(f"{name} must be real, got {value!r}.")
        if np.shape(value):
            raise ValueError(
                f"{name} must be one number, got {described(**{name: value})}. "
                "Weigh examples in the objective, or call the function once per value (jax.vmap)."
            )


def per_example(examples: Sequence[int], **scalars: Any) -> None:
    """Raises ValueError unless every shape is `[]` or leading axes of `examples`."""
    for name, value in scalars.items():
        shape = np.shape(value)
        if shape != tuple(examples)[: len(shape)]:
            raise ValueError(
                f"{name} must be one number or one per example {list(examples)}, "
                f"got {described(**{name: value})}. Reshape it, e.g. {name}[:, 0] or "
                f"jnp.squeeze({name}, axis=-1)."
            )


def several_classes(**logits: Any) -> None:
    """Raises ValueError for one class: its softmax is always 1, so every loss is 0."""
    rank(1, **logits)
    for name, array in logits.items():
        if np.shape(array)[-1] == 1:
            raise ValueError(
                f"a softmax over one class is always 1, got {described(**{name: array})}. For a "
                "binary head of one logit z use losses.binary_kl, or pass the pair [z, 0]: "
                "jnp.concatenate([z, jnp.zeros_like(z)], axis=-1)."
            )


def no_text(**labels: Any) -> None:
    """Raises TypeError for anything but an array, and for arrays of text."""
    for name, array in labels.items():
        if isinstance(array, jax.Array):
            continue
        if array is None:
            raise TypeError(f"{name} must be integers, got None.")
        if (values := np.asarray(array)).dtype.kind in "USO":
            raise TypeError(
                f"{name} must be integers, got text: {np.ravel(values)[:3].tolist()}. "
                f"Number the classes first: np.unique({name}, return_inverse=True)[1]."
            )
        if isinstance(array, (list, tuple)):
            raise TypeError(
                f"{name} must be an array, got a {type(array).__name__} of {len(array)}. "
                f"Use jnp.asarray({name})."
            )


def integers(**given: Any) -> None:
    """Raises TypeError unless every array has an integer dtype."""
    arrays(**given)
    for name, array in given.items():
        dtype = jnp.result_type(np.asarray(array) if isinstance(array, (list, tuple)) else array)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"{name} must be integers, got {dtype}{list(np.shape(array))}. "
                f"Use {name}.astype(jnp.int32); one-hot labels: jnp.argmax(…, axis=-1)."
            )


def integer(**numbers: Any) -> None:
    """Raises TypeError unless every number is an integer, neither traced nor a bool."""
    for name, number in numbers.items():
        try:
            operator.index(number)
            if isinstance(number, (bool, np.bool_)):
                raise TypeError
        except TypeError:
            kind = type(number).__name__
            raise TypeError(f"{name} must be an integer, got {number!r:.80} ({kind}).") from None


def count(at_least: int, **numbers: Any) -> None:
    """Raises unless every number is an integer (never traced) of at least `at_least`."""
    integer(**numbers)
    for name, number in numbers.items():
        if operator.index(number) < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {number}.")


def indices(size: int, **arrays: Any) -> None:
    """Raises unless every array has an integer dtype and, if concrete, values in 0..size-1."""
    integers(**arrays)
    for name, array in arrays.items():
        values = concrete(array)
        if values is not None and values.size and (values.min() < 0 or values.max() >= size):
            raise ValueError(
                f"{name} must lie in 0..{size - 1}, got {values.min()}..{values.max()}."
            )


def labels(labels: Any, logits: Any, where: Any = None) -> None:
    """Raises unless `labels` are class numbers of shape `logits.shape[:-1]`.

    Concrete labels must lie in 0..classes-1 wherever the mask `where` (bool, the labels' shape) is
    true; masked labels may be anything.
    """
    shape, classes = np.shape(logits)[:-1], np.shape(logits)[-1]
    one_hot = "jnp.argmax(labels, axis=-1)"
    no_text(labels=labels)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        repair = one_hot if np.shape(labels) == np.shape(logits) else "labels.astype(jnp.int32)"
        raise TypeError(
            f"labels must be integers, got {jnp.result_type(labels)}{list(np.shape(labels))}. "
            f"Use {repair}."
        )
    if np.shape(labels) != shape:
        repair = ""
        if np.shape(labels) == (*shape, 1):
            repair = " Drop the last axis: jnp.squeeze(labels, axis=-1)."
        elif np.shape(labels) == np.shape(logits):
            repair = f" One-hot labels: {one_hot}."
        raise ValueError(
            f"labels must have shape {list(shape)}, one per row of logits, "
            f"got {described(labels=labels, logits=logits)}.{repair}"
        )
    mask(where, shape)
    values, included = concrete(labels), None if where is None else concrete(where)
    if values is None or (where is not None and included is None):
        return
    labels_used = values if included is None else values[included]
    outside = (labels_used < 0) | (labels_used >= classes)
    if outside.any():
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, got {labels_used.min()}..{labels_used.max()}. "
            f"{_label_repair(labels_used, outside, classes)}"
        )


def _label_repair(labels: np.ndarray, is_outside: np.ndarray, classes: int) -> str:
    """The repair for labels out of range, guessed from their values."""
    invalid = np.unique(labels[is_outside])
    if len(invalid) == 1 and (invalid[0] in (-1, -100, 255) or invalid[0] < 0):
        return f"Mask ignored positions: where=(labels != {invalid[0]})."
    if labels.min() == 1 and labels.max() == classes:
        return "These labels count from 1: use labels - 1."
    if len(np.unique(labels)) <= classes:
        return "Number the classes from 0: np.unique(labels, return_inverse=True)[1]."
    return f"The logits have {classes} classes."


def mask(where: Any, shape: Sequence[int], name: str = "where") -> None:
    """Raises unless `where`, the argument `name`, is None or a bool array of exactly `shape`."""
    if where is None:
        return
    arrays(**{name: where})
    dtype = jnp.result_type(where if hasattr(where, "dtype") else np.asarray(where))
    if dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool, got {dtype}. Use {name} > 0.")
    if tuple(np.shape(where)) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {described(**{name: where})}.")


def path(**given: Any) -> Path:
    """Converts the one value to a path; raises TypeError unless it is text or a path."""
    ((name, value),) = given.items()
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"{name} must be the path of a file or folder, got {value!r:.80} "
            f"({type(value).__name__})."
        )
    return Path(value)


def mappings(**given: Any) -> None:
    """Raises TypeError unless every value is a mapping by name."""
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict by name, got {type(value).__name__}.")


def instance(kind: type, **given: Any) -> None:
    """Raises TypeError unless every value is a `kind`."""
    for name, value in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {value!r:.80}.")


def same_keys(**mappings: Mapping[str, Any]) -> None:
    """Raises ValueError unless all mappings have the same keys; names the differences."""
    for name, mapping in mappings.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{name} must be a mapping, got {type(mapping).__name__}.")
    (first, left), *rest = mappings.items()
    for second, right in rest:
        if left.keys() != right.keys():
            raise ValueError(
                f"{first} and {second} must have the same keys; only in {first}: "
                f"{sorted(left.keys() - right.keys())}, only in {second}: "
                f"{sorted(right.keys() - left.keys())}."
            )


def same_leaves(**flats: Mapping[str, Any]) -> None:
    """Raises ValueError unless all `{path: leaf}` dicts have the first one's paths and shapes.

    Every difference is named with its path; a missing path is shown with the nearest other path.
    """
    (first, left), *rest = flats.items()
    for second, right in rest:
        problems = []
        for path in [path for path in left if path not in right]:
            candidates = [] if len(problems) >= 8 else [name for name in right if name not in left]
            matches = difflib.get_close_matches(path, candidates[:1000], n=1, cutoff=0.0)
            hint = f" (nearest there: {matches[0]!r})" if matches else ""
            problems.append(f"{second} lacks {path!r}{hint}")
        problems += [f"{first} lacks {path!r}" for path in right if path not in left]
        for path in [path for path in left if path in right]:
            if np.shape(left[path]) != np.shape(right[path]):
                shapes = described(**{first: left[path], second: right[path]})
                problems.append(f"{path!r} is {shapes}")
        if problems:
            suffix = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(
                f"{first} and {second} must have the same leaves and shapes: "
                f"{'; '.join(problems[:8])}{suffix}. Nothing is broadcast: rename, resize or "
                "exclude these leaves first (transfer, or where=)."
            )


def _short(value: np.ndarray) -> str:
    return str(value) if value.size <= 6 else f"values in {value.min()}..{value.max()}"
