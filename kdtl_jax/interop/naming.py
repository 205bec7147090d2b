"""Names and axes of PyTorch weights as invertible rules.

A table of rules is data: each says which torch name is which canonical path, and how the axes are
permuted between the two. Read left to right it imports, right to left it exports, and
`to_torch(from_torch(x)) == x` bit for bit, because axes are only permuted and regrouped. Every
tensor needs a rule (or an entry in `ignore`); nothing is dropped silently.

PyTorch keeps output features first, `[out, in]` and `[out, in, *window]`; Flax keeps them last.
Equinox keeps PyTorch's axes. Position ids, masks and step counters are not weights: list them in
`ignore`.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _checks, trees
from kdtl_jax._types import PyTree
from kdtl_jax.interop import _unclear_axes


class Axes(NamedTuple):
    """Maps a torch tensor's axes to a JAX array's: split, permute, flip, join.

    `split` gives, per torch axis, the lengths it is split into (None: not split). `order[i]` is the
    torch axis, counted after splitting, at JAX position `i` (None: unchanged). `flip` lists the JAX
    axes, counted before joining, to reverse. `join` gives the number of these axes that make up
    each final axis (None: one).
    """

    order: tuple[int, ...] | None = None
    flip: tuple[int, ...] = ()
    split: tuple[tuple[int, ...] | None, ...] | None = None
    join: tuple[int, ...] | None = None


same = Axes()  # the tensor as it is
linear = Axes((1, 0))  # [out, in] to [in, out]
conv1d = Axes((2, 1, 0))  # [out, in, length] to [length, in, out]
conv2d = Axes((2, 3, 1, 0))  # [out, in, h, w] to [h, w, in, out]
conv3d = Axes((2, 3, 4, 1, 0))  # [out, in, d, h, w] to [d, h, w, in, out]
# torch stores the kernel of a transposed convolution as that of the matching forward convolution,
# [in, out, *window]; Flax's ConvTranspose (transpose_kernel=False) expects it swapped and mirrored.
conv_transpose1d = Axes((2, 0, 1), flip=(0,))
conv_transpose2d = Axes((2, 3, 0, 1), flip=(0, 1))  # as `conv_transpose1d`
conv_transpose3d = Axes((2, 3, 4, 0, 1), flip=(0, 1, 2))  # as `conv_transpose1d`


def flattened(channels: int, *window: int) -> Axes:
    """The axes of a linear layer on a flattened map: torch flattens C, H, W; Flax H, W, C.

    `flattened(64, 7, 7)` is for the layer `nn.Linear(64 * 7 * 7, ...)`.
    """
    window_axes = tuple(range(2, 2 + len(window)))
    return Axes((*window_axes, 1, 0), split=(None, (channels, *window)), join=(len(window) + 1, 1))


def unflattened(channels: int, *window: int) -> Axes:
    """The axes of a linear layer whose outputs become a map: `nn.Linear(n, 64 * 7 * 7)`.

    `unflattened_vector` is for its bias, or any other vector with one number per position.
    """
    window_axes = tuple(range(1, 1 + len(window)))
    last = len(window_axes) + 1
    return Axes((last, *window_axes, 0), split=((channels, *window), None), join=(1, last))


def unflattened_vector(channels: int, *window: int) -> Axes:
    """The axes of a flattened map, `[C * H * W]` in torch and `[H * W * C]` in Flax."""
    window_axes = tuple(range(1, 1 + len(window)))
    return Axes((*window_axes, 0), split=((channels, *window),), join=(len(window_axes) + 1,))


class Rule(NamedTuple):
    """`torch` name `<->` `jax` path.

    `{i}` and other placeholders stand for the text of one segment (a layer number) and must be the
    same on both sides: `Rule("layer.{i}.fc.weight", "layers_{i}/fc/kernel", linear)`.
    """

    torch: str
    jax: str
    axes: Axes = same


def from_torch(
    tensors: Mapping[str, Any], rules: Sequence[Rule], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Converts a torch state dict to `{canonical path: array}`.

    Args:
      tensors: `{torch name: array}`; arrays may be memory maps or `jax.ShapeDtypeStruct`s. NumPy
        arrays come back as views: nothing is read or copied.
      rules: the table; the first rule that matches a name is used.
      ignore: regular expressions (for the whole name) of tensors that are not weights.

    Raises:
      ValueError: if a name has no rule, two names become one path, or the rank of an array is not
        that of its rule's axes.
    """
    _checks.mappings(tensors=tensors)
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a list of patterns, got {ignore!r:.80}.")
    out: dict[str, Any] = {}
    patterns = [re.compile(pattern) for pattern in ignore]
    for name, array in tensors.items():
        if any(pattern.fullmatch(name) for pattern in patterns):
            continue
        path, axes = _translate(name, rules, ", or name the tensor in ignore=.")
        if path in out:
            raise ValueError(f"{name!r} and another tensor both become {path!r}.")
        out[path] = _to_jax(name, array, axes)
    return out


def to_torch(tree: PyTree, rules: Sequence[Rule]) -> dict[str, Any]:
    """Converts a tree (or a flat dict of paths) to `{torch name: array}`: inverts `from_torch`.

    Raises:
      ValueError: if a path has no rule, or two paths become one name.
    """
    out: dict[str, Any] = {}
    table = [(rule.jax, rule.torch, rule.axes) for rule in rules]
    for path, array in trees.flatten(tree).items():
        name, axes = _translate(path, table, ".")
        if name in out:
            raise ValueError(f"{path!r} and another path both become {name!r}.")
        out[name] = _to_torch(path, array, axes)
    return out


def convention(
    tree: PyTree, *, prefix: str = "", axes: Sequence[tuple[trees.Selector, Axes]] = ()
) -> list[Rule]:
    """Rules for a Linen tree with the torch model's module names, `/` for `.`.

    `kernel`, `scale` and `embedding` become `weight`; `mean` and `var` become `running_mean` and
    `running_var`; a leading `params` or `batch_stats` is not part of the torch name. Matrices are
    transposed. Give the axes that a shape does not determine:

    - whether a kernel of more axes belongs to a convolution, a transposed convolution or a stack of
      layers;
    - whether a linear layer reads a flattened map or makes one (beside convolutions, or of the size
      of a color image);
    - what a scale or bias of several axes is in torch;
    - whether a square leaf of another name is transposed, or a square kernel beside one that is
      `same` (as in GPT-2).

        naming.convention(variables, axes=[
            (".*/conv\\d/kernel", naming.conv2d),
            (".*/up/kernel", naming.conv_transpose2d),
            (".*/fc1/kernel", naming.flattened(64, 7, 7)),
        ])

    Args:
      tree: a concrete or abstract tree, for example `params` or all variables.
      prefix: added before every torch name, for example `"backbone."`.
      axes: ordered `[(selector, Axes), ...]`; the first that selects a leaf is used.

    Raises:
      ValueError: if the axes of a kernel must be given, or a selector is never used.
    """
    torch_names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    torch_names |= {"mean": "running_mean", "var": "running_var"}
    flat = trees.flatten(tree)
    given_axes = _axes_by_path(tree, list(flat), axes)
    evidence = _evidence(flat, given_axes)
    problems = [
        text
        for path, leaf in flat.items()
        if path not in given_axes
        and (text := _unclear_axes.why_unclear(path, tuple(leaf.shape), evidence))
    ]
    if problems:
        raise ValueError(
            "the axes of these leaves cannot be inferred from their shapes; give them with "
            "axes=[(path, naming.conv2d), ...]:\n  " + "\n  ".join(problems[:12])
        )
    rules = []
    for path, leaf in flat.items():
        segments = path.split("/")
        if segments[0] in ("params", "batch_stats"):
            segments = segments[1:]
        last = segments[-1]
        name = ".".join([*segments[:-1], torch_names.get(last, last)])
        is_matrix = last == "kernel" and len(leaf.shape) == 2
        rules.append(Rule(prefix + name, path, given_axes.get(path, linear if is_matrix else same)))
    return rules


def covers(rules: Sequence[Rule], name: str) -> bool:
    """Whether a rule names this torch tensor."""
    return any(_pattern(rule.torch).fullmatch(name) for rule in rules)


def _axes_by_path(
    tree: PyTree, paths: Sequence[str], axes: Sequence[tuple[trees.Selector, Axes]]
) -> dict[str, Axes]:
    labels = trees.labels(tree, [(where, i) for i, (where, _) in enumerate(axes)], default=-1)
    numbers = zip(paths, jax.tree.leaves(labels), strict=True)
    return {path: axes[number][1] for path, number in numbers if number >= 0}


def _evidence(flat: Mapping[str, Any], given_axes: Mapping[str, Axes]) -> _unclear_axes.Evidence:
    """What a tree's shapes and the given axes say about the other leaves."""
    kernels = {p: tuple(x.shape) for p, x in flat.items() if p.split("/")[-1] == "kernel"}
    maps = [shape for shape in kernels.values() if len(shape) > 2]
    matrices = {path: shape for path, shape in kernels.items() if len(shape) == 2}
    embeddings = {
        x.shape[-1] for p, x in flat.items() if p.split("/")[-1] == "embedding" and x.shape
    }
    splits = {path: axes.split or () for path, axes in given_axes.items()}
    map_layers = {
        path for path, split in splits.items() if len(split) == 2 and split[0] is not None
    }
    inputs = {shape[0] for shape in matrices.values()}
    outputs = {shape[1] for path, shape in matrices.items() if path not in map_layers}
    channels = {shape[-1] for shape in maps}
    external_inputs = inputs - outputs - channels - embeddings
    if not external_inputs and not maps and not embeddings:
        external_inputs = inputs  # as in an autoencoder: some input comes from outside
    joins = [split for path, split in splits.items() if given_axes[path].join is not None]
    return _unclear_axes.Evidence(
        channels=channels,
        images={shape[-2] for shape in maps},
        inputs=inputs,
        outputs=outputs,
        external_inputs=external_inputs,
        flattened={math.prod(parts) for split in joins for parts in split if parts},
        not_maps=embeddings
        | {x[0] for path, x in matrices.items() if given_axes.get(path) == linear},
        keeps_axes=any(given_axes.get(path) == same for path in matrices),
    )


def _translate(name: str, table: Sequence[tuple[str, str, Axes]], hint: str) -> tuple[str, Axes]:
    for source, target, axes in table:
        match = _pattern(source).fullmatch(name)
        if match is not None:
            return target.format_map(match.groupdict()), axes
    close = trees.nearest(name, [source for source, _, _ in table])
    raise ValueError(f"no rule covers {name!r}. The nearest rules are {close}. Add a rule{hint}")


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(
        f"(?P<{piece}>[^./]+)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)
    )
    return re.compile(text)


def _to_jax(name: str, array: Any, axes: Axes) -> Any:
    """The array with JAX's axes."""
    if axes == same:
        return array
    pieces = _pieces(name, array.shape, axes)
    _check_axes(name, axes, len(pieces))
    order = axes.order or tuple(range(len(pieces)))
    sizes = [pieces[i] for i in order]
    final = _joined_shape(sizes, axes)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(final, array.dtype)
    return _reshape(_flip(_reshape(array, pieces).transpose(order), axes), final)


def _to_torch(path: str, array: Any, axes: Axes) -> Any:
    """The array with torch's axes."""
    if axes == same:
        return array
    split = axes.split or (None,) * len(axes.order or array.shape)
    _check_axes(path, axes, sum(1 if part is None else len(part) for part in split))
    sizes, shape = _sizes(path, array.shape, axes)
    order = axes.order or tuple(range(len(sizes)))
    inverse = tuple(int(i) for i in np.argsort(order))
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return _reshape(_flip(_reshape(array, sizes), axes).transpose(inverse), shape)


def _pieces(name: str, shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """The lengths of a torch tensor's axes after splitting."""
    if axes.split is None:
        _check_rank(name, shape, len(axes.order or shape))
        return tuple(shape)
    _check_rank(name, shape, len(axes.split))
    out: list[int] = []
    for length, parts in zip(shape, axes.split, strict=True):
        if parts is not None and math.prod(parts) != length:
            raise ValueError(
                f"{name!r} has shape {list(shape)}, but its rule splits an axis into "
                f"{list(parts)}. The table is for another architecture."
            )
        out += [length] if parts is None else parts
    return tuple(out)


def _sizes(path: str, shape: Sequence[int], axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of a JAX array's axes before joining, and those of the torch tensor."""
    if axes.split is None:
        _check_rank(path, shape, len(axes.order or shape))
        torch_shape = [shape[int(i)] for i in np.argsort(axes.order or range(len(shape)))]
        return tuple(shape), tuple(torch_shape)
    # Only one axis in a group may have an unknown length; an axis that is not split is a group.
    lengths = [n for parts in axes.split for n in (parts or (None,))]
    order = axes.order or tuple(range(len(lengths)))
    join = axes.join or (1,) * len(order)
    _check_rank(path, shape, len(join))
    sizes: list[int] = []
    positions = iter(order)
    for length, count in zip(shape, join, strict=True):
        group = [lengths[next(positions)] for _ in range(count)]
        known_product = math.prod(n for n in group if n is not None)
        group = [length // max(known_product, 1) if n is None else n for n in group]
        if math.prod(group) != length:
            raise ValueError(
                f"{path!r} has shape {list(shape)}, but its rule joins {group} into one axis. "
                "The table is for another architecture."
            )
        sizes += group
    pieces = [sizes[int(i)] for i in np.argsort(order)]
    torch_shape, start = [], 0
    for parts in axes.split:
        stop = start + len(parts or (None,))
        torch_shape.append(math.prod(pieces[start:stop]))
        start = stop
    return tuple(sizes), tuple(torch_shape)


def _joined_shape(sizes: Sequence[int], axes: Axes) -> tuple[int, ...]:
    if axes.join is None:
        return tuple(sizes)
    stops = list(itertools.accumulate(axes.join))
    return tuple(math.prod(sizes[a:b]) for a, b in zip([0, *stops], stops, strict=False))


def _reshape(array: Any, shape: Sequence[int]) -> Any:
    return array if tuple(array.shape) == tuple(shape) else array.reshape(shape)


def _flip(array: Any, axes: Axes) -> Any:
    steps = tuple(slice(None, None, -1 if i in axes.flip else 1) for i in range(array.ndim))
    return array[steps] if axes.flip else array


def _check_axes(name: str, axes: Axes, pieces: int) -> None:
    order, join = axes.order or range(pieces), axes.join or (1,) * pieces
    if (
        sorted(order) != list(range(pieces))
        or not set(axes.flip) <= set(range(pieces))
        or sum(join) != pieces
        or min(join, default=1) < 1
    ):
        raise ValueError(
            f"the rule of {name!r} must name each of its {pieces} axes once, counted from 0, got "
            f"{axes}."
        )


def _check_rank(name: str, shape: Sequence[int], rank: int) -> None:
    if len(shape) != rank:
        raise ValueError(
            f"{name!r} has shape {list(shape)}, but its rule permutes {rank} axes. The table is "
            "for another architecture."
        )
