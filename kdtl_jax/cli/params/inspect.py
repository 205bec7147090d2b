"""`kdtl params inspect`: names, shapes, dtypes, sizes, and, with `--values`, statistics."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _text, transforms, trees
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import WIDEST, TensorSelection
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor
from kdtl_jax.recipes.settings import UsageError, setting

LONGEST = 2000  # characters of a line
EXAMPLES = f"""
kdtl params inspect model.safetensors --where 'encoder/.*' --values
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(TensorSelection):
    """List a checkpoint's tensors."""

    source: str | None = setting(None, "a checkpoint", positional=True)
    values_: bool = setting(
        False, "read the values: mean, deviation, range, zeros, NaN and infinity, equal tensors"
    )


class Values(NamedTuple):
    """Statistics of one tensor's finite entries, and a digest of its bytes."""

    mean: float
    std: float
    least: float
    most: float
    zeros: int
    nonfinite: int
    digest: str


def run(settings: Settings) -> int:
    """Prints a checkpoint's tensors."""
    if not settings.source:
        raise UsageError(f"name SOURCE, for example: {EXAMPLES.strip().splitlines()[0]}")
    # Not `opened`: tensors that cannot be loaded (8-bit floats) can still be listed.
    checkpoint = safetensors.index(settings.source)
    tensors = checkpoint.tensors
    if tensors:
        specs = {name: jax.ShapeDtypeStruct(t.shape, jnp.float32) for name, t in tensors.items()}
        chosen = trees.mask(specs, _checkpoints.selected(settings, specs))
        tensors = {name: t for name, t in tensors.items() if chosen[name]}
    tensors = {name: tensors[name] for name in sorted(tensors, key=trees.natural_key)}
    entries = sum(math.prod(t.shape) for t in tensors.values())
    nbytes = sum(t.stop - t.start for t in tensors.values())
    files = f"{len(checkpoint.files)} file{'s' * (len(checkpoint.files) != 1)}"
    print(f"{files}, {len(tensors)} tensors, {entries:,} numbers, {_checkpoints.size(nbytes)}")
    for key, value in sorted(checkpoint.metadata.items()):
        print(f"  metadata  {_text.shown(key, WIDEST)}: {_text.shown(value, LONGEST)}")
    for line in _with_values(tensors, nbytes) if settings.values_ else _listing(tensors):
        print(f"  {line}")
    return 0


def _listing(tensors: Mapping[str, Tensor]) -> list[str]:
    """One line per dtype, shape and name pattern; numbers in names are collapsed."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, tensor in tensors.items():
        key = (re.sub(r"\d+", "#", name), tensor.dtype, str(list(tensor.shape)))
        groups.setdefault(key, []).append(name)
    rows = [
        (_text.shown(path, WIDEST), dtype, shape)
        for (_, dtype, shape), names in groups.items()
        for path in transforms.collapse_paths(names)
    ]
    width = max((len(path) for path, *_ in rows), default=0)
    return [f"{path:<{width}}  {dtype:5} {shape}" for path, dtype, shape in rows]


def _with_values(tensors: Mapping[str, Tensor], total: int) -> list[str]:
    shown = {name: _text.shown(name, WIDEST) for name in tensors}
    width = max(map(len, shown.values()), default=0)
    advance = _checkpoints.progress(total, "reading: ")
    lines, by_digest = [], {}
    for name, tensor in tensors.items():
        line = f"{shown[name]:<{width}}  {tensor.dtype:5} {list(tensor.shape)!s:16}"
        if tensor.dtype.startswith("F8"):
            lines.append(f"{line} an 8-bit float, not read")
            continue
        values = statistics(tensor)
        advance(tensor.stop - tensor.start)
        lines.append(
            f"{line} mean {values.mean:.4g}, std {values.std:.4g}, in [{values.least:.4g}, "
            f"{values.most:.4g}]"
            + (f", {values.zeros:,} zeros" if values.zeros else "")
            + (f", {values.nonfinite:,} NaN or infinite" if values.nonfinite else "")
        )
        by_digest.setdefault((tensor.dtype, tensor.shape, values.digest), []).append(name)
    for (_, shape, _), names in by_digest.items():
        if len(names) > 1 and math.prod(shape) > 1:
            lines.append(f"equal, perhaps tied: {_text.shown(', '.join(names), LONGEST)}")
    return lines


def statistics(tensor: Tensor) -> Values:
    """One pass over a tensor in pieces; moments are summed in float64 around the first piece's."""
    digest = hashlib.sha256()
    count = zeros = nonfinite = 0
    first = shifted = squares = 0.0
    least, most = math.inf, -math.inf
    for block in safetensors.blocks(tensor, _checkpoints.BLOCK):
        digest.update(block.view(np.uint8).data)
        values = np.abs(block) if np.iscomplexobj(block) else block
        values = values.astype(np.float64)
        finite = values[np.isfinite(values)]
        nonfinite += values.size - finite.size
        zeros += int(np.count_nonzero(finite == 0))
        if not finite.size:
            continue
        if not count:
            first = float(finite.mean())
        count += finite.size
        least, most = min(least, float(finite.min())), max(most, float(finite.max()))
        finite -= first
        shifted += float(finite.sum())
        squares += float(np.square(finite).sum())
    mean = shifted / count if count else math.nan
    std = math.sqrt(max(squares / count - mean**2, 0)) if count else math.nan
    return Values(first + mean, std, least, most, zeros, nonfinite, digest.hexdigest())
