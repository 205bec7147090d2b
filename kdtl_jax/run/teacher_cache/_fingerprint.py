"""Fingerprints of caches: digests of weights and data, and all else that outputs depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.run import data

DTYPES = ("float32", "bfloat16", "float16")
MAX_CHARACTERS = 600  # characters of a difference
HASHED_BYTES = 32 * 2**20  # of a memory-mapped array at a time


class Fingerprint(NamedTuple):
    """Everything that a teacher's outputs depend on; build it with `fingerprint`.

    A field that is None in the expected fingerprint is not compared: use `_replace(teacher=None)`
    if the teacher's weights are not available. The cache must hold at least these `taps`.
    """

    model: str | None  # the teacher as text: what determines its outputs besides the weights
    classes: tuple[str, ...] | None  # names of its logits, in order
    teacher: str | None  # SHA-256 of the variables' paths, shapes, dtypes and values
    data: str | None  # SHA-256 of the inputs
    size: int | None  # number of examples
    preprocessing: Mapping[str, Any] | None  # JSON
    taps: tuple[str, ...] | None  # names of the outputs
    logits: str | None  # "dense", or "the 32 most likely classes at temperature 1.0"
    dtype: str | None  # of the stored outputs
    views: str | None  # "none", or "4 of key 0 42"


def fingerprint(
    variables: PyTree,
    arrays: Mapping[str, Any],
    *,
    model: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    taps: Sequence[str] = ("logits",),
    top_k: int | None = None,
    temperature: float = 1.0,
    dtype: Any = jnp.float32,
    views: int | None = None,
    view_key: Array | None = None,
) -> Fingerprint:
    """Makes the fingerprint of the outputs to store, or of those that a run needs.

    Args:
      variables: the teacher's parameters, or `Variables`; a SHA-256 from `digest` if the weights
        in use are derived from known ones (int8); or None.
      arrays: the data, `{"inputs": [N, ...], ...}`; only `"inputs"` is hashed, in its order.
      model: the teacher's architecture as text, such as "vit:heads=8" or `repr(module)`: networks
        that differ in heads or strides may have weights of the same shapes.
      classes: names of the classes, in the logits' order.
      preprocessing: everything else that determines the outputs, as JSON: normalization, tokenizer,
        augmentation settings, the teacher's precision.
      taps: names of the outputs to store.
      top_k: stores logits as log-probabilities of this many classes and the mass of the tail; None
        stores them dense.
      temperature: of the softmax before it is cut to `top_k`.
      dtype: of the stored outputs: float32, bfloat16 or float16.
      views: how many epochs of augmented views; None for unaugmented data.
      view_key: their key, `data.view_key(key)`.

    Raises:
      ValueError: if there are no inputs or taps, or settings contradict each other.
      TypeError: if `preprocessing` is not JSON, or the dtype is not one of the three.
    """
    _checks.mappings(arrays=arrays, preprocessing={} if preprocessing is None else preprocessing)
    for name, names in (("taps", taps), ("classes", () if classes is None else classes)):
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
            raise TypeError(f"{name} must be a list of names, got {names!r:.80}.")
    if "inputs" not in arrays:
        raise ValueError(f'arrays need an entry "inputs", got {sorted(arrays)}.')
    if not taps:
        raise ValueError('taps is empty: name at least one output, such as "logits".')
    dtype_name = jnp.dtype(dtype).name
    if dtype_name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype_name}.")
    if top_k is not None:
        _checks.count(1, top_k=top_k)
    if top_k is not None and "logits" not in taps:
        raise ValueError(f'top_k={top_k} needs "logits" among the taps, got {list(taps)}.')
    if views is not None:
        _checks.count(1, views=views)
    if (views is None) != (view_key is None):
        raise ValueError(
            f"augmented views need both views= (at least 1) and view_key=, got "
            f"views={views}, view_key={view_key}."
        )
    _checks.scalar(temperature=temperature)
    _checks.positive(temperature=temperature)
    size = data.length(arrays)
    if size == 0:
        raise ValueError(
            f"there are no examples, got {_checks.described(**trees.flatten(arrays))}."
        )
    key_words = [] if view_key is None else np.ravel(jax.random.key_data(view_key))
    return Fingerprint(
        model=model,
        classes=None if classes is None else tuple(map(str, classes)),
        teacher=variables if variables is None or isinstance(variables, str) else digest(variables),
        data=digest(arrays["inputs"]),
        size=size,
        preprocessing=json.loads(json.dumps(dict(preprocessing or {}))),
        taps=tuple(taps),
        logits=f"the {top_k} most likely classes at temperature {float(temperature)}"
        if top_k is not None
        else "dense",
        dtype=dtype_name,
        views="none" if view_key is None else f"{views} of key {' '.join(map(str, key_words))}",
    )


def digest(tree: PyTree) -> str:
    """SHA-256 of a tree's paths, shapes, dtypes and values, the same on every machine.

    Host arrays are hashed in the 32-bit dtype that JAX gives them; memory-mapped ones are read in
    chunks.
    """
    sha256 = hashlib.sha256()
    for path, leaf in trees.flatten(tree).items():
        array = np.asarray(jax.random.key_data(leaf)) if _checks.is_key(leaf) else as_numpy(leaf)
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        sha256.update(json.dumps([path, list(array.shape), dtype.name]).encode())
        step = max(1, HASHED_BYTES // max(1, array[:1].nbytes)) if array.ndim else 1
        starts = range(0, len(array), step) if array.ndim else [0]
        for start in starts:
            chunk = array[start : start + step] if array.ndim else array
            little_endian = np.ascontiguousarray(chunk, dtype).astype(
                dtype.newbyteorder("<"), copy=False
            )
            sha256.update(little_endian.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def differences(cached: Fingerprint, expect: Fingerprint) -> list[str]:
    """Lists the differences between a cache's fingerprint and the expected one."""

    def differs(name: str) -> bool:
        expected = getattr(expect, name)
        return expected is not None and getattr(cached, name) != expected

    result = []
    if differs("model"):
        origin = f"is of {cached.model!r}"
        origin = "does not say which model made it" if cached.model is None else origin
        result.append(f"models differ: the cache {origin}, this is {expect.model!r}")
    if differs("classes"):
        stored, expected = (list(x or ()) for x in (cached.classes, expect.classes))
        result.append(f"classes differ: {stored} in the cache, {expected} here")
    if differs("teacher"):
        result.append(
            f"teacher weights differ: the cache was made by {_short(cached.teacher)}, these are "
            f"{_short(expect.teacher)} (SHA-256)"
        )
    if differs("size"):
        result.append(f"number of examples differs: {cached.size} in the cache, {expect.size} here")
    elif differs("data"):
        result.append(
            f"data differ: the cache was made from inputs {_short(cached.data)}, these are "
            f"{_short(expect.data)} (SHA-256; the order of the rows counts)"
        )
    if expect.preprocessing is not None:
        result += _setting_differences(cached.preprocessing or {}, expect.preprocessing)
    missing = [tap for tap in expect.taps or () if tap not in (cached.taps or ())]
    if missing:
        result.append(
            f"taps are missing: {missing} requested, but the cache holds {list(cached.taps or ())}"
        )
    for name in filter(differs, ("logits", "dtype", "views")):
        stored, expected = getattr(cached, name), getattr(expect, name)
        result.append(f"{name} differ: {stored} in the cache, {expected} requested")
    return [_text.shown(line, MAX_CHARACTERS) for line in result]


def from_json(value: Mapping[str, Any]) -> Fingerprint:
    """Reads a fingerprint from a plan."""
    lists = [value.get("taps"), value.get("classes") or []]
    are_lists = all(isinstance(x, (list, tuple)) for x in lists)
    are_names = are_lists and all(isinstance(name, str) for x in lists for name in x)
    values = [value.get(name) for name in ("model", "teacher", "data", "logits", "dtype", "views")]
    are_texts = all(x is None or isinstance(x, str) for x in values)
    is_mapping = isinstance(value.get("preprocessing") or {}, Mapping)
    if value.keys() != set(Fingerprint._fields) or not (are_names and are_texts and is_mapping):
        raise ValueError("its fingerprint is missing or odd")
    classes = None if value["classes"] is None else tuple(value["classes"])
    return Fingerprint(**value)._replace(taps=tuple(value["taps"]), classes=classes)


def as_numpy(x: Any) -> np.ndarray:
    """A host view; memory-mapped arrays stay mapped, without their subclass's cost per index."""
    return x.view(np.ndarray) if isinstance(x, np.ndarray) else np.asarray(x)


def _setting_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Compares preprocessing entry by entry."""
    expected = json.loads(json.dumps(dict(expected)))
    changed = [
        f"{name!r} was {stored.get(name, 'not set')}, is {expected.get(name, 'not set')}"
        for name in sorted(stored.keys() | expected.keys())
        if (name in stored) != (name in expected) or stored[name] != expected[name]
    ]
    return [f"preprocessing differs: {', '.join(changed)}"] if changed else []


def _short(sha: str | None) -> str:
    return "unknown" if sha is None else f"{sha[:12]}…"
