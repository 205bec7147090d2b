"""Recognizes quantized weights: codes, and scales of codes, which arithmetic must not touch.

Codes of eight bits or fewer are recognized by their dtype. Wider integers may be packed codes
(GPTQ, AWQ, MLX, compressed-tensors: several small numbers in each), counters, or tables of
indices; the leaves' names in these formats, and the scales beside them, tell which. The scales are
part of the weight: multiplied or cut without the codes, they give another matrix.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, trees

# Integer arrays of these names are codes wherever they are stored.
_PACKED = re.compile(r"(?i)(q_?weight|w_?q|q_?zeros|q_?idxs|q_?scale|\w*_?packed|trellis|codes)")
_WEIGHTS = re.compile(r"(?i)(weight|kernel|embedding|w)")
_INDICES = re.compile(r"(?i)(.*_)?(ids?|idx|index|mask|map|positions?|counts?|keys?|shape)")
_SCALES = re.compile(
    r"(?i)(\w*_)?(q?scales?|wscale|scb|absmax|q?zeros?|zero_points?|codebooks?|centroids|"
    r"lookup_table|quant_map)(_inv|_max|_2)?"
)


def is_code(leaf: Any) -> bool:
    """Whether a leaf has the dtype of codes: integers or floats of at most eight bits."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or np.ndim(leaf) == 0:
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits <= 8
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits <= 8


def quantized(flat: Mapping[str, Any]) -> set[str]:
    """The paths of all codes of `{path: leaf}`, and of the scales and zeros that belong to them."""
    segments = {path: re.split(r"[./]", path) for path in flat}
    scales = {path for path, names in segments.items() if _SCALES.fullmatch(names[-1])}
    scaled = {tuple(segments[p][:-1]) for p in scales if trees.is_inexact(flat[p])}
    codes = {
        path
        for path, names in segments.items()
        if is_code(flat[path])
        or (is_integers(flat[path]) and _is_packed(names, np.ndim(flat[path]), scaled))
    }
    owners = {tuple(segments[path][cut]) for path in codes for cut in (slice(-1), slice(None))}
    return codes | {path for path in scales if tuple(segments[path][:-1]) in owners}


def refuse_codes(flat: Mapping[str, Any], selected: Collection[str] | None = None) -> None:
    """Raises ValueError if a leaf of `{path: leaf}` holds quantized codes, or scales of them.

    Args:
      flat: all leaves, because neighbors determine whether a leaf holds codes.
      selected: the paths that would be computed with; None means all.
    """
    codes = quantized(flat)
    codes = sorted(codes if selected is None else codes & set(selected), key=trees.natural_key)
    if codes:
        listed = ", ".join(f"{path!r} ({flat[path].dtype})" for path in codes[:8])
        remainder = f" and {len(codes) - 8} more" if len(codes) > 8 else ""
        raise ValueError(
            f"{listed}{remainder} hold integer codes or 8-bit floats, or their scales, whose "
            "values mean nothing without each other. Dequantize them to 16 bits or more first, or "
            "leave them out."
        )


def is_integers(leaf: Any) -> bool:
    """Whether a leaf is an array of integers with at least one axis."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and np.ndim(leaf) > 0 and jnp.issubdtype(dtype, jnp.integer)


def check_integers(path: str, leaf: Any, others: Sequence[Any]) -> None:
    """Refuses integers that are floats in another tree, and integer matrices that differ.

    Counters differ between runs, and the first tree's are used. A matrix of integers is either a
    table of indices, equal in all trees, or packed codes.
    """
    if not is_integers(leaf):
        return
    for other in others:
        if trees.is_inexact(other):
            raise ValueError(beside_numbers(path))
        if np.ndim(leaf) > 1 and _differ(_checks.concrete(leaf), _checks.concrete(other)):
            raise ValueError(
                f"{path!r} holds integers {list(np.shape(leaf))} that differ between the trees: "
                "packed codes cannot be combined. Dequantize them to floating point first."
            )


def beside_numbers(path: str) -> str:
    """The message for codes that are floating-point numbers in another tree."""
    return (
        f"{path!r} holds integers in one tree and floating-point numbers in another: integer "
        "codes mean nothing without their scales. Dequantize them to floating point first."
    )


def _is_packed(names: Sequence[str], rank: int, scaled: set[tuple[str, ...]]) -> bool:
    """Whether integers of more than eight bits are packed codes."""
    if _PACKED.fullmatch(names[-1]):
        return True
    if rank < 2 or _INDICES.fullmatch(names[-1]):
        return False
    return bool(_WEIGHTS.fullmatch(names[-1])) or bool({tuple(names[:-1]), tuple(names)} & scaled)


def _differ(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and not np.array_equal(a, b)
