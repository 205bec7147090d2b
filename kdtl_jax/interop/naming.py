"""Names and axes of PyTorch weights as invertible rules.

A table of rules is data: each says which torch name is which canonical path, and how the axes are
permuted between the two. Read left to right it imports, right to left it exports, and
`to_torch(from_torch(x)) == x` bit for bit, because only views and permutations are involved. Every
tensor needs a rule (or an entry in `ignore`); nothing is dropped in silence.

PyTorch keeps output features first, `[out, in]` and `[out, in, *window]`; Flax keeps them last.
Equinox keeps PyTorch's axes. Position ids, masks and step counters are no weights: list them in
`ignore`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import PyTree


class Axes(NamedTuple):
    """How a torch tensor's axes become a JAX array's.

    `order[i]` is the torch axis at JAX position `i` (None: as they are); `flip` lists JAX axes that
    run the other way.
    """

    order: tuple[int, ...] | None = None
    flip: tuple[int, ...] = ()


same = Axes()
linear = Axes((1, 0))
conv1d = Axes((2, 1, 0))
conv2d = Axes((2, 3, 1, 0))
conv3d = Axes((2, 3, 4, 1, 0))
# torch stores a transposed convolution as the convolution whose gradient it is, [in, out, *window];
# Flax's ConvTranspose (transpose_kernel=False) wants it in and out swapped back, and mirrored.
conv_transpose1d = Axes((2, 0, 1), flip=(0,))
conv_transpose2d = Axes((2, 3, 0, 1), flip=(0, 1))


class Rule(NamedTuple):
    """`torch` name `<->` `jax` path.

    `{i}` and other placeholders stand for one segment's text (a layer number) and must be
    the same on both sides: `Rule("layer.{i}.fc.weight", "layers_{i}/fc/kernel", linear)`.
    """

    torch: str
    jax: str
    axes: Axes = same


def from_torch(
    tensors: Mapping[str, Any], rules: Sequence[Rule], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """`{canonical path: array}` from a torch state dict.

    Args:
      tensors: `{torch name: array}`; arrays may be memory maps or `jax.ShapeDtypeStruct`s. NumPy
        arrays come back as views: nothing is read or copied.
      rules: the table; the first rule that matches a name is used.
      ignore: regular expressions (for the whole name) of tensors that are no weights.

    Raises:
      ValueError: if a name has no rule, two names become one path, or an array has another
        rank than its rule's axes.
    """
    out: dict[str, Any] = {}
    patterns = [re.compile(pattern) for pattern in ignore]
    for name, array in tensors.items():
        if any(pattern.fullmatch(name) for pattern in patterns):
            continue
        path, axes = _translated("from_torch", name, [(r.torch, r.jax, r.axes) for r in rules])
        if path in out:
            raise ValueError(f"{name!r} and another tensor both become {path!r}.")
        out[path] = _permuted(name, array, axes)
    return out


def to_torch(tree: PyTree, rules: Sequence[Rule]) -> dict[str, Any]:
    """`{torch name: array}` from a tree (or a flat dict of paths): the inverse of `from_torch`.

    Raises:
      ValueError: if a path has no rule, or two paths become one name.
    """
    out: dict[str, Any] = {}
    for path, array in trees.flatten(tree).items():
        name, axes = _translated("to_torch", path, [(r.jax, r.torch, r.axes) for r in rules])
        if name in out:
            raise ValueError(f"{path!r} and another path both become {name!r}.")
        out[name] = _unpermuted(path, array, axes)
    return out


def convention(tree: PyTree, *, prefix: str = "") -> list[Rule]:
    """Rules for a Linen tree whose module names are the torch twin's, `/` for `.`.

    `kernel`, `scale` and `embedding` become `weight` (kernels permuted by their rank), `mean`
    and `var` become `running_mean` and `running_var`; a leading `params` or `batch_stats` is not
    part of the torch name.

    Args:
      tree: a concrete or abstract tree, for example `params` or all variables.
      prefix: put before every torch name, for example `"backbone."`.
    """
    torch_names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    torch_names |= {"mean": "running_mean", "var": "running_var"}
    kernels = {2: linear, 3: conv1d, 4: conv2d, 5: conv3d}
    rules = []
    for path, leaf in trees.flatten(tree).items():
        segments = path.split("/")
        if segments[0] in ("params", "batch_stats"):
            segments = segments[1:]
        last = segments[-1]
        name = ".".join([*segments[:-1], torch_names.get(last, last)])
        axes = kernels.get(len(leaf.shape), same) if last == "kernel" else same
        rules.append(Rule(prefix + name, path, axes))
    return rules


def _translated(fn: str, name: str, table: Sequence[tuple[str, str, Axes]]) -> tuple[str, Axes]:
    for source, target, axes in table:
        found = _pattern(source).fullmatch(name)
        if found is not None:
            return target.format_map(found.groupdict()), axes
    close = trees.nearest(name, [source for source, _, _ in table])
    raise ValueError(
        f"{fn}: no rule covers {name!r}. The nearest rules are {close}. Add a rule"
        + (", or name the tensor in ignore=." if fn == "from_torch" else ".")
    )


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(
        f"(?P<{piece}>[^./]+)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)
    )
    return re.compile(text)


def _permuted(name: str, array: Any, axes: Axes) -> Any:
    if axes.order is None:
        return array
    _check_rank(name, array, axes)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(array.shape[i] for i in axes.order), array.dtype)
    return _flipped(array.transpose(axes.order), axes)


def _unpermuted(path: str, array: Any, axes: Axes) -> Any:
    if axes.order is None:
        return array
    _check_rank(path, array, axes)
    inverse = tuple(int(i) for i in np.argsort(axes.order))
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(array.shape[i] for i in inverse), array.dtype)
    return _flipped(array, axes).transpose(inverse)


def _flipped(array: Any, axes: Axes) -> Any:
    steps = tuple(slice(None, None, -1 if i in axes.flip else 1) for i in range(array.ndim))
    return array[steps] if axes.flip else array


def _check_rank(name: str, array: Any, axes: Axes) -> None:
    assert axes.order is not None
    if len(array.shape) != len(axes.order):
        raise ValueError(
            f"{name!r} has shape {list(array.shape)}, but its rule permutes "
            f"{len(axes.order)} axes. The table is for another architecture."
        )
