"""`kdtl params diff`: names, shapes, and dtypes, then how far apart the values are."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdtl_jax import _text, trees
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import Opened, Selection
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor
from kdtl_jax.recipes.settings import setting

EXAMPLES = f"""
kdtl params diff before.safetensors after.safetensors --where 'encoder/.*'
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(Selection):
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
    one = _checkpoints.opened(settings.source, "SOURCE", EXAMPLES)
    other = _checkpoints.opened(settings.target, "TARGET", EXAMPLES)
    both = one.specs | other.specs
    chosen = trees.mask(both, _checkpoints.selected(settings, both)) if both else {}
    names = sorted((path for path in both if chosen[path]), key=trees.natural_key)
    shared = [path for path in names if path in one.tensors and path in other.tensors]
    done = _checkpoints.progress(sum(one.tensors[p].stop - one.tensors[p].start for p in shared))
    rows = []
    for path in names:
        rows += _compared(path, one, other)
        if path in one.tensors:
            done(one.tensors[path].stop - one.tensors[path].start)
    shown = [_text.shown(path, _checkpoints.WIDEST) for _, path, _ in rows]
    width = max(map(len, shown), default=0)
    for name, (status, _, detail) in zip(shown, rows, strict=True):
        print(f"  {status:9} {name:<{width}}  {detail}".rstrip())
    different = len({path for _, path, _ in rows})
    print(f"{different} of {len(names)} tensors differ")
    return 1 if settings.exit_code and different else 0


def _compared(path: str, one: Opened, other: Opened) -> list[tuple[str, str, str]]:
    a, b = one.tensors.get(path), other.tensors.get(path)
    if a is None or b is None:
        there = b if a is None else a
        assert there is not None
        side = other.name if a is None else one.name
        return [("only in", path, f"{side}: {there.dtype} {list(there.shape)}")]
    if a.shape != b.shape:
        return [("shape", path, f"{list(a.shape)} and {list(b.shape)}")]
    rows = [] if a.dtype == b.dtype else [("dtype", path, f"{a.dtype} and {b.dtype}")]
    apart = distance(a, b)
    if apart.differing:
        detail = (
            f"{apart.differing:,} of {math.prod(a.shape):,} entries, largest {apart.largest:.3g}, "
            f"relative {apart.relative:.3g}, cosine {apart.cosine:.6f}"
        )
        rows.append(("values", path, detail))
    return rows


def distance(a: Tensor, b: Tensor) -> Distance:
    """The difference of two tensors of one shape, in float64, read in pieces."""
    largest, differing = 0.0, 0
    apart = before = after = inner = 0.0
    pairs = zip(
        safetensors.blocks(a, _checkpoints.BLOCK),
        safetensors.blocks(b, _checkpoints.BLOCK),
        strict=True,
    )
    for x, y in pairs:
        wide = np.complex128 if np.iscomplexobj(x) or np.iscomplexobj(y) else np.float64
        x, y = x.astype(wide), y.astype(wide)
        unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
        differing += int(np.count_nonzero(unequal))
        gap = np.abs(np.where(unequal, x - y, 0))
        largest = max(largest, float(gap.max(initial=0)), key=lambda v: math.inf if v != v else v)
        apart += float(np.square(gap).sum())
        before += float(np.square(np.abs(x)).sum())
        after += float(np.square(np.abs(y)).sum())
        inner += float((x * np.conj(y)).real.sum())
    norms = math.sqrt(before) * math.sqrt(after)
    return Distance(
        largest,
        math.sqrt(apart) / math.sqrt(before) if before else math.inf,
        inner / norms if norms else 0.0,
        differing,
    )
