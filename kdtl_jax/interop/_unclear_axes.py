"""Leaves whose axes a tree's shapes do not determine: those that PyTorch may store differently.

A wrong guess would be silent, because the shapes fit. Any leaf that might be a flattened map, an
image or a transposed square matrix therefore counts as unclear.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Others(NamedTuple):
    """Properties of a tree's leaves, by which each one is judged."""

    channels: set[int]  # that convolutions make
    images: set[int]  # that convolutions read
    read: set[int]  # lengths that linear layers read
    made: set[int]  # lengths that linear layers make, other than flattened maps
    entering: set[int]  # lengths that linear layers read and no layer makes
    flattened: set[int]  # lengths of the maps that rules flatten
    plain: set[int]  # lengths that are not maps, according to tables and rules
    as_stored: bool  # a matrix of a linear layer is stored as it is here


def others(
    flat: Mapping[str, Any],
    makers: Collection[str],
    flattened: Collection[int],
    same: Collection[str],
    linear: Collection[str],
) -> Others:
    """Describes a tree.

    According to the rules, `makers` are the linear layers that make maps, the leaves `same` are
    stored with these axes, and the kernels `linear` do not read maps.
    """
    kernels = {p: tuple(x.shape) for p, x in flat.items() if p.split("/")[-1] == "kernel"}
    maps = [shape for shape in kernels.values() if len(shape) > 2]
    matrices = {path: shape for path, shape in kernels.items() if len(shape) == 2}
    tables = [tuple(x.shape) for p, x in flat.items() if p.split("/")[-1] == "embedding"]
    read = {shape[0] for shape in matrices.values()}
    made = {shape[1] for path, shape in matrices.items() if path not in makers}
    channels = {shape[-1] for shape in maps}
    entering = read - made - channels - {shape[-1] for shape in tables if shape}
    if not entering and not maps and not tables:
        entering = read  # as in an autoencoder: some input comes from outside
    return Others(
        channels=channels,
        images={shape[-2] for shape in maps},
        read=read,
        made=made,
        entering=entering,
        flattened=set(flattened),
        plain={shape[-1] for shape in tables if shape}
        | {shape[0] for path, shape in matrices.items() if path in linear},
        as_stored=any(path in same for path in matrices),
    )


def unclear(path: str, shape: tuple[int, ...], others: Others) -> str | None:
    """Why a leaf's axes cannot be inferred from its shape; None if they can."""
    name = path.split("/")[-1]
    start = f"{path} {list(shape)}: "
    if name == "kernel" and len(shape) > 2:
        kind = {3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(len(shape))
        if kind is None:
            return start + "Axes(...)"
        transposed = kind.replace("conv", "conv_transpose")
        return start + f"naming.{kind}, naming.{transposed} or Axes(...)"
    if name == "kernel" and len(shape) == 2:
        if _reads_a_map(shape, others):
            return start + "naming.flattened(channels, height, width), or naming.linear"
        if _may_make_a_map(shape, others):
            return start + "naming.unflattened(channels, height, width), or naming.linear"
        if others.as_stored and shape[0] == shape[1] > 1:
            return start + "naming.same, as another kernel here, or naming.linear"
        return None
    if name in ("scale", "bias", "mean", "var"):
        if len(shape) > 1:
            return start + "Axes(...)"
        if shape and _is_of_a_map(shape[0], others):
            return start + "naming.unflattened_vector(channels, height, width), or naming.same"
        return None
    if name == "embedding" and len(shape) <= 2:
        return None
    # If another order of the axes has another shape, a transfer refuses the wrong one. A window
    # from one channel to one is reversed in a transposed convolution.
    long = [length for length in shape if length > 1]
    if len(set(long)) < len(long) or (name == "weight" and len(shape) > 2 and shape[0] == shape[1]):
        turned = ", naming.linear" if len(shape) == 2 else ""
        return start + f"naming.same{turned} or Axes(...)"
    return None


def _is_of_a_map(length: int, others: Others) -> bool:
    """Whether a vector may belong to a flattened map: no layer has as many outputs of its own."""
    if length in others.made | others.channels | others.images | others.plain:
        return False
    return length in others.flattened or any(_is_multiple(length, n) for n in others.channels)


def _reads_a_map(shape: tuple[int, ...], others: Others) -> bool:
    """Whether the inputs of a linear layer may be a flattened map."""
    if any(_is_multiple(shape[0], channels) for channels in others.channels):
        return True
    if shape[0] not in others.entering:
        return False
    # Beside convolutions, maps may have been joined; without them, an image may come in.
    return max(others.channels, default=1) > 1 or _is_color_image(shape[0])


def _may_make_a_map(shape: tuple[int, ...], others: Others) -> bool:
    """Whether the outputs of a linear layer may become a map."""
    if shape[1] in others.read - others.entering:
        return False  # An output that another linear layer reads is not a map.
    # An image of at most four channels is not made from more numbers than it has.
    if any(
        _is_multiple(shape[1], channels) and (channels > 4 or shape[1] > shape[0])
        for channels in others.images
    ):
        return True
    is_image = _is_color_image(shape[1]) and not others.channels
    return is_image and (shape[1] in others.entering or shape[1] > shape[0])


def _is_color_image(length: int) -> bool:
    """Whether this many numbers are an image of three channels, less than twice as wide as high."""
    places, odd = divmod(length, 3)
    sides = range(2, math.isqrt(places) + 1)
    return not odd and any(places % side == 0 and places < 2 * side * side for side in sides)


def _is_multiple(length: int, channels: int) -> bool:
    return channels > 1 and length > channels and length % channels == 0
