"""Aligns the hidden units of two networks of one architecture."""

from collections.abc import Sequence

import jax
import numpy as np

from kdtl_jax import _checks, trees
from kdtl_jax._types import Params
from kdtl_jax.transforms import _width
from kdtl_jax.transforms._width import Axis, AxisSpec


def match_permutations(
    reference: Params,
    other: Params,
    spec: AxisSpec,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
) -> dict[str, np.ndarray]:
    """Git Re-Basin's weight matching: permutations that bring `other` closest to `reference`.

    Maximizes `sum_leaves <reference, permuted other>` by coordinate descent: names are visited in
    random order, each solved as a linear assignment given the others, until a sweep gains nothing.
    Every named axis of the spec is permuted, so axes whose order has a meaning (inputs, classes,
    tokens) must be None. Runs on the host in float64. Apply the result with
    `permute_units(other, spec, permutations)`, inside `jit` if needed, then average or interpolate.

    Args:
      reference: the network that stays as it is.
      other: a network of the same structure and shapes.
      spec: the names of the axes.
      seed: sets the order in which names are visited; the local optimum may depend on it.
      max_sweeps: the largest number of sweeps.

    Returns:
      `{name: [size] int64}` for `permute_units`.

    Raises:
      ValueError: as in `axis_sizes`; also if the two trees differ in structure or shapes, or hold
        NaN or infinity.

    References:
      Ainsworth, Hayase and Srinivasa, Git Re-Basin, 2022 (2209.04836).
    """
    _checks.count(0, seed=seed, max_sweeps=max_sweeps)
    if jax.tree.structure(reference) != jax.tree.structure(other):
        raise ValueError(
            "the two networks must have one structure, got "
            f"{jax.tree.structure(reference)} and {jax.tree.structure(other)}."
        )
    axes, sizes = _width.axes_and_sizes(reference, spec)
    pairs: list[tuple[np.ndarray, np.ndarray, tuple[Axis, ...]]] = []
    for (path, a), b, leaf_axes in zip(
        trees.flatten(reference).items(), jax.tree.leaves(other), axes, strict=True
    ):
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{path!r} has shapes {list(np.shape(a))} and "
                f"{list(np.shape(b))}; they must be equal."
            )
        if any(axis.name is not None for axis in leaf_axes):
            host_a, host_b = (np.asarray(leaf).astype(np.float64) for leaf in (a, b))
            if not (np.isfinite(host_a).all() and np.isfinite(host_b).all()):
                raise ValueError(f"{path!r} holds NaN or infinity.")
            pairs.append((host_a, host_b, leaf_axes))
    permutations = {name: np.arange(size) for name, size in sizes.items()}
    order = np.random.default_rng(seed)
    for _ in range(max_sweeps):
        gains = [
            _improve(permutations, str(name), pairs) for name in order.permutation(sorted(sizes))
        ]
        if not any(gain > 1e-12 for gain in gains):
            break
    return permutations


def _improve(
    permutations: dict[str, np.ndarray],
    name: str,
    pairs: Sequence[tuple[np.ndarray, np.ndarray, tuple[Axis, ...]]],
) -> float:
    """Solves for one name given the others; returns the gain as a share of the total similarity."""
    # scipy comes with jax; importing it here keeps `import kdtl_jax` light.
    from scipy.optimize import linear_sum_assignment

    size = len(permutations[name])
    similarity = np.zeros((size, size))
    for a, b, axes in pairs:
        for position, axis in enumerate(axes):
            if axis.name != name:
                continue
            aligned = b
            for other, other_axis in enumerate(axes):
                if other != position and other_axis.name is not None:
                    split = _split(aligned, other, other_axis)
                    aligned = np.take(split, permutations[other_axis.name], axis=other + 1)
                    aligned = aligned.reshape(b.shape)
            similarity += _rows(a, position, axis) @ _rows(aligned, position, axis).T
    units, partners = linear_sum_assignment(similarity, maximize=True)
    old_score = similarity[units, permutations[name]].sum()
    new_score = similarity[units, partners].sum()
    if new_score > old_score:
        permutations[name] = partners.astype(np.int64)
    matched = np.abs(similarity).sum()
    return float(new_score - old_score) / matched if matched else 0.0


def _split(leaf: np.ndarray, position: int, axis: Axis) -> np.ndarray:
    shape = leaf.shape
    units = shape[position] // (axis.outer * axis.inner)
    return leaf.reshape(*shape[:position], axis.outer, units, axis.inner, *shape[position + 1 :])


def _rows(leaf: np.ndarray, position: int, axis: Axis) -> np.ndarray:
    """`[units, everything else]`."""
    split = np.moveaxis(_split(leaf, position, axis), position + 1, 0)
    return split.reshape(split.shape[0], -1)
