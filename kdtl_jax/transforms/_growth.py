"""Growing a network without changing its function: wider by copied units, deeper by identities."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import _codes, _width
from kdtl_jax.transforms._depth import layer_numbers, layer_of, select_layers
from kdtl_jax.transforms._width import Axis, AxisSpec


def widen(
    params: Params,
    spec: AxisSpec,
    widths: Mapping[str, int | Sequence[int] | np.ndarray],
    *,
    key: Array | None = None,
) -> Params:
    """Net2WiderNet: copies units, and divides the weights that sum over them by the copies.

    The function is preserved exactly (to rounding) in any network in which a unit's copies stay
    equal: dense and convolutional layers with elementwise activations, the hidden units and whole
    heads of attention blocks, gated units. It is not preserved for the residual stream under
    normalization, unless every unit is copied equally often, nor for a query-key width, unless the
    softmax scale is restored by `scale(params, sqrt(new / old), where="query")`.

    Args:
      spec: the names of the axes; mark the layers that sum over a widened axis with
        `Axis("mlp", summed=True)`.
      widths: `{name: new number of units}`, the old ones first, or the old unit that each new one
        copies.
      key: draws which units are copied. None copies them in turn from the first.

    Raises:
      ValueError: as in `axis_sizes`; also if a name is unknown, a width shrinks, an old unit is
        left out, or no leaf is marked as summing over the axis.

    References:
      Chen, Goodfellow and Shlens, Net2Net, 2015 (1511.05641).
    """
    axes, sizes = _width.axes_and_sizes(params, spec)
    summed = {axis.name for leaf_axes in axes for axis in leaf_axes if axis.summed}
    sources: dict[str, Any] = {}
    for name, width in widths.items():
        size = _width.size_of_name(name, sizes)
        if name not in summed:
            raise ValueError(
                f"no leaf is marked as summing over {name!r}, so its inputs would be "
                f"counted twice. Write Axis({name!r}, summed=True) where a layer consumes it."
            )
        # Folded from the name, so widening one axis draws the same as widening several.
        own_key = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        sources[name] = _copied_units(name, size, width, own_key)

    def grow(leaf: Array, position: int, axis: Axis, index: Any) -> Array:
        wider = _width.take_units(leaf, position, axis, index)
        if not axis.summed:
            return wider
        split = _width.split_axis(_numerics.upcast(wider), position, axis)
        old_size = leaf.shape[position] // (axis.outer * axis.inner)
        copies = jnp.zeros(old_size, split.dtype).at[index].add(1)[index]
        shape = [1] * split.ndim
        shape[position + 1] = len(index)
        divided = split / copies.reshape(shape)
        return _width.join_axis(divided, position).astype(wider.dtype)

    return _width.over_axes(params, axes, sources, grow)


def deepen(
    params: Params,
    layers: str,
    after: Sequence[int],
    make: Callable[[str, Any], Any],
) -> Params:
    """Net2DeeperNet: inserts a layer after each of the given ones, and renumbers (`select_layers`).

    Args:
      layers: as in `select_layers`.
      after: positions of the layers after which one is inserted.
      make: `(path, leaf) -> leaf`, makes each of the new layer's leaves from that of the layer
        before it: `identity_layer` for chains, `copy_with_zeros(selector)` for residual blocks.

    Raises:
      ValueError: as in `select_layers`; also if `after` holds a position twice.

    References:
      Chen, Goodfellow and Shlens, Net2Net, 2015 (1511.05641).
    """
    count = len(layer_numbers(params, layers))
    if len(set(after)) != len(after):
        raise ValueError(f"after must hold each position once, got {list(after)}.")
    order = sorted([*range(count), *after])
    inserted = {i for i in range(1, len(order)) if order[i] == order[i - 1]}
    deeper = select_layers(params, layers, order)
    numbers = layer_numbers(deeper, layers)
    new = {numbers[i] for i in inserted}
    flat = trees.flatten(deeper)
    _codes.refuse_codes(flat, [path for path in flat if layer_of(layers, path) in new])

    def fill(path: str, leaf: Any) -> Any:
        number = layer_of(layers, path)
        return make(path, leaf) if number in new and trees.is_inexact(leaf) else leaf

    return trees.map_with_path(fill, deeper)


def identity_layer(path: str, leaf: Any) -> Array:
    """A layer that returns its input: identity kernels (centered for convolutions), zero biases.

    Preserves the function after an idempotent activation, such as ReLU. Kernels are
    `[..., in, out]`.

    Raises:
      ValueError: if a kernel's last two axes differ, or a convolution's window is even.
    """
    shape = np.shape(leaf)
    if len(shape) < 2:
        return jnp.zeros(shape, jnp.result_type(leaf))
    window = shape[:-2]
    if shape[-1] != shape[-2] or any(n % 2 == 0 for n in window):
        raise ValueError(
            f"{path!r} must have as many outputs as inputs and odd windows, got "
            f"{list(shape)}. "
            "For residual blocks use copy_with_zeros(selector of the last projection)."
        )
    center = tuple(n // 2 for n in window)
    kernel = jnp.zeros(shape, jnp.result_type(leaf))
    return kernel.at[center].set(jnp.eye(shape[-1], dtype=kernel.dtype))


def copy_with_zeros(where: trees.Selector) -> Callable[[str, Any], Any]:
    """Makes layers for `deepen`: copies in which the selected leaves are zero.

    A residual block whose last projection (kernel and bias) is zero adds nothing.
    """
    selects = trees.any_of(where)
    return lambda path, leaf: jnp.zeros_like(leaf) if selects(path, leaf) else leaf


def _copied_units(
    name: str, size: int, width: int | Sequence[int] | np.ndarray, key: Array | None
) -> np.ndarray | Array:
    """The old unit that each new one copies."""
    if not isinstance(width, (int, np.integer)):
        index = np.asarray(width)
        _checks.integers(**{name: index})
        if not np.array_equal(np.unique(index), np.arange(size)):
            raise ValueError(
                f"the indices of {name!r} must contain every unit of 0..{size - 1}, got "
                f"{index.tolist()}. select_width drops units."
            )
        return index
    if width < size:
        raise ValueError(f"{name!r} cannot shrink from {size} to {width} units. Use select_width.")
    if key is None:
        return np.arange(width) % size
    extra = jax.random.randint(key, (width - size,), 0, size, jnp.int32)
    return jnp.concatenate([jnp.arange(size, dtype=jnp.int32), extra])
