"""Finds leaves whose axes in PyTorch cannot be inferred from a tree's shapes.

A wrong guess would be silent, because the shapes fit. Any leaf that might be a flattened map, an
image or a transposed square matrix therefore counts as unclear.
"""

import math
from typing import NamedTuple


class Evidence(NamedTuple):
    """Lengths in a tree, by which each leaf is judged."""

    channels: set[int]  # outputs of convolutions
    images: set[int]  # inputs of convolutions
    inputs: set[int]  # inputs of linear layers
    outputs: set[int]  # outputs of linear layers, other than flattened maps
    external_inputs: set[int]  # inputs of linear layers that no layer makes
    flattened: set[int]  # maps that rules flatten
    not_maps: set[int]  # lengths that are not maps, according to embeddings and rules
    keeps_axes: bool  # whether a linear layer's matrix is stored with these axes


def why_unclear(path: str, shape: tuple[int, ...], evidence: Evidence) -> str | None:
    """Explains why a leaf's axes cannot be inferred from its shape; None if they can."""
    name = path.split("/")[-1]
    start = f"{path} {list(shape)}: "
    if name == "kernel" and len(shape) > 2:
        name_ = {3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(len(shape))
        if name_ is None:
            return start + "Axes(...)"
        transposed = name_.replace("conv", "conv_transpose")
        return start + f"naming.{name_}, naming.{transposed} or Axes(...)"
    if name == "kernel" and len(shape) == 2:
        if _reads_a_map(shape, evidence):
            return start + "naming.flattened(channels, height, width), or naming.linear"
        if _may_make_a_map(shape, evidence):
            return start + "naming.unflattened(channels, height, width), or naming.linear"
        if evidence.keeps_axes and shape[0] == shape[1] > 1:
            return start + "naming.same, as another kernel here, or naming.linear"
        return None
    if name in ("scale", "bias", "mean", "var"):
        if len(shape) > 1:
            return start + "Axes(...)"
        if shape and _may_be_flattened(shape[0], evidence):
            return start + "naming.unflattened_vector(channels, height, width), or naming.same"
        return None
    if name == "embedding" and len(shape) <= 2:
        return None
    # If another order of the axes has another shape, a transfer refuses the wrong one. A window
    # from one channel to one is reversed in a transposed convolution.
    lengths = [length for length in shape if length > 1]
    if len(set(lengths)) < len(lengths) or (
        name == "weight" and len(shape) > 2 and shape[0] == shape[1]
    ):
        alternatives = ", naming.linear" if len(shape) == 2 else ""
        return start + f"naming.same{alternatives} or Axes(...)"
    return None


def _may_be_flattened(length: int, evidence: Evidence) -> bool:
    """Whether a vector may belong to a flattened map: no layer has this number of outputs."""
    if length in evidence.outputs | evidence.channels | evidence.images | evidence.not_maps:
        return False
    return length in evidence.flattened or any(_is_multiple(length, n) for n in evidence.channels)


def _reads_a_map(shape: tuple[int, ...], evidence: Evidence) -> bool:
    """Whether the inputs of a linear layer may be a flattened map."""
    if any(_is_multiple(shape[0], channels) for channels in evidence.channels):
        return True
    if shape[0] not in evidence.external_inputs:
        return False
    # Beside convolutions, maps may have been joined; without them, an image may come in.
    return max(evidence.channels, default=1) > 1 or _is_color_image(shape[0])


def _may_make_a_map(shape: tuple[int, ...], evidence: Evidence) -> bool:
    """Whether the outputs of a linear layer may become a map."""
    if shape[1] in evidence.inputs - evidence.external_inputs:
        return False  # An output that another linear layer reads is not a map.
    # An image of at most four channels is not made from more numbers than it has.
    if any(
        _is_multiple(shape[1], channels) and (channels > 4 or shape[1] > shape[0])
        for channels in evidence.images
    ):
        return True
    is_image = _is_color_image(shape[1]) and not evidence.channels
    return is_image and (shape[1] in evidence.external_inputs or shape[1] > shape[0])


def _is_color_image(length: int) -> bool:
    """Whether this many numbers are an image of three channels, less than twice as wide as high."""
    places, odd = divmod(length, 3)
    sides = range(2, math.isqrt(places) + 1)
    return not odd and any(places % side == 0 and places < 2 * side * side for side in sides)


def _is_multiple(length: int, channels: int) -> bool:
    return channels > 1 and length > channels and length % channels == 0
