"""`kdtl params diff`: names, shapes, and dtypes, then how far apart the values are."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdtl_jax import _text, trees
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import Opened, TensorSelection
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor
from kdtl_jax.recipes.settings import setting

EXAMPLES = f"""
kdtl params diff before.safetensors after.safetensors --where 'encoder/.*'
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(TensorSelection):
    """Compare two checkpoints."""

    source: str | None = setting(None, "a checkpoint", positional=True)
    target: str | None = setting(None, "another", positional=True)
    exit_code: bool = setting(False, "exit with status 1 if anything differs, like git diff")


class Distance(NamedTuple):
    """The difference of two tensors of one shape; entries that are NaN in both count as equal."""

    largest: float  # max |a - b|
    relative: float  # |a - b| / |a|, Euclidean
    cosine: float
    differing: int


def run(settings: Settings) -> int:
    """Prints the differences, and one line for what is equal."""
    source = _checkpoints.opened(settings.source, "SOURCE", EXAMPLES)
    target = _checkpoints.opened(settings.target, "TARGET", EXAMPLES)
    specs = source.specs | target.specs
    chosen = trees.mask(specs, _checkpoints.selected(settings, specs)) if specs else {}
    names = sorted((path for path in specs if chosen[path]), key=trees.natural_key)
    shared = [path for path in names if path in source.tensors and path in target.tensors]
    advance = _checkpoints.progress(
        sum(source.tensors[p].stop - source.tensors[p].start for p in shared)
    )
    rows = []
    for path in names:
        rows += _compared(path, source, target)
        if path in source.tensors:
            advance(source.tensors[path].stop - source.tensors[path].start)
    shown = [_text.shown(path, _checkpoints.WIDEST) for _, path, _ in rows]
    width = max(map(len, shown), default=0)
    for name, (status, _, detail) in zip(shown, rows, strict=True):
        print(f"  {status:9} {name:<{width}}  {detail}".rstrip())
    different = len({path for _, path, _ in rows})
    print(f"{different} of {len(names)} tensors differ")
    return 1 if settings.exit_code and different else 0


def _compared(path: str, source: Opened, target: Opened) -> list[tuple[str, str, str]]:
    a, b = source.tensors.get(path), target.tensors.get(path)
    if a is None or b is None:
        tensor = b if a is None else a
        assert tensor is not None
        side = target.name if a is None else source.name
        return [("only in", path, f"{side}: {tensor.dtype} {list(tensor.shape)}")]
    if a.shape != b.shape:
        return [("shape", path, f"{list(a.shape)} and {list(b.shape)}")]
    rows = [] if a.dtype == b.dtype else [("dtype", path, f"{a.dtype} and {b.dtype}")]
    gap = distance(a, b)
    if gap.differing:
        detail = (
            f"{gap.differing:,} of {math.prod(a.shape):,} entries, largest {gap.largest:.3g}, "
            f"relative {gap.relative:.3g}, cosine {gap.cosine:.6f}"
        )
        rows.append(("values", path, detail))
    return rows


def distance(a: Tensor, b: Tensor) -> Distance:
    """The difference of two tensors of one shape, in float64, read in pieces."""
    largest, differing = 0.0, 0
    gap_squares = a_squares = b_squares = inner = 0.0
    pairs = zip(
        safetensors.blocks(a, _checkpoints.BLOCK),
        safetensors.blocks(b, _checkpoints.BLOCK),
        strict=True,
    )
    for x, y in pairs:
        dtype = np.complex128 if np.iscomplexobj(x) or np.iscomplexobj(y) else np.float64
        x, y = x.astype(dtype), y.astype(dtype)
        unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
        differing += int(np.count_nonzero(unequal))
        gap = np.abs(np.where(unequal, x - y, 0))
        largest = max(largest, float(gap.max(initial=0)), key=lambda v: math.inf if v != v else v)
        gap_squares += float(np.square(gap).sum())
        a_squares += float(np.square(np.abs(x)).sum())
        b_squares += float(np.square(np.abs(y)).sum())
        inner += float((x * np.conj(y)).real.sum())
    norms = math.sqrt(a_squares) * math.sqrt(b_squares)
    return Distance(
        largest,
        math.sqrt(gap_squares) / math.sqrt(a_squares) if a_squares else math.inf,
        inner / norms if norms else 0.0,
        differing,
    )
