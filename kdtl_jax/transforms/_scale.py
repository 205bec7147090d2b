"""Parameter distillation by scaling: `theta_small = alpha * theta_large`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _codes, _leaves
from kdtl_jax.transforms._leaves import Coefficient


def scale(
    params: Params, alpha: Coefficient, *, where: trees.Selector = trees.everything
) -> Params:
    """`theta_small = alpha * theta_large`, leaf by leaf.

    Pure and differentiable in `alpha`; a whole sweep over `alpha` is one `vmap`. Half-precision
    leaves are multiplied in float32 and keep their dtype. Only inexact arrays are scaled;
    counters, PRNG keys and functions pass through, as do leaves that are not selected.

    Natural values are 1 (a plain copy) and, after units were removed,
    `sqrt(fan_in_large / fan_in_small)`, which restores the size of the pre-activations.

    Args:
      alpha: a number or traced scalar; a function `(path) -> number`; ordered rules
        `[(selector, number), ...]`, where leaves that match no rule are not changed; or a pytree
        prefix of numbers. A coefficient may also have its leaf's rank, with lengths 1 or the
        leaf's own (such as one value per layer of a scanned kernel).
      where: which leaves are scaled.

    Raises:
      ValueError: if `where` or a rule matches nothing, a coefficient does not fit its leaf, or a
        selected leaf holds quantized integer codes.
      TypeError: if a coefficient is not a real number.
    """
    leaves, treedef = jax.tree.flatten(params)
    flags = jax.tree.leaves(_leaves.select_inexact(params, where))
    values = _leaves.coefficients(alpha, params, flags)
    scaled = [
        leaf if value is None else _leaves.multiply(leaf, value)
        for leaf, value in zip(leaves, values, strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled)


def scale_homogeneous(
    params: Params,
    alpha: Scalar,
    layers: Sequence[trees.Selector],
    *,
    bias: trees.Selector = r"(.*[/.])?(bias|b)",
) -> Params:
    """Scales a positively homogeneous chain so that its output is exactly `alpha^D` times the old.

    In `f(x) = W_D relu(... relu(W_1 x + b_1) ...) + b_D` the weights of every layer are multiplied
    by `alpha` and the bias of layer `d` by `alpha^d`, which multiplies each activation of layer
    `d` by `alpha^d`. Scaling logits by `alpha^D` is a softmax temperature of `alpha^-D`; plain
    `scale` breaks this at the biases. It requires `alpha >= 0` and layers joined only by
    homogeneous functions (ReLU, leaky ReLU, max and average pooling); it does not hold across
    normalization, sigmoids or residual sums.

    Args:
      alpha: a number or traced scalar, >= 0.
      layers: one selector per layer, in the order of the forward pass, `"Dense_0/.*"` first.
        Together they must select every floating-point leaf.
      bias: which of these leaves are added rather than multiplied.

    Raises:
      ValueError: if a layer matches nothing, a floating-point leaf is in no layer, no leaf of a
        layer is a weight, or `alpha` is negative.
    """
    if isinstance(layers, (str, trees.Glob)) or not layers:
        raise ValueError(
            "layers must be a sequence with one selector per layer, in the "
            f"order of the forward pass, got {layers!r}."
        )
    _checks.within(0, float("inf"), alpha=alpha)
    flat = trees.flatten(params)
    _codes.refuse_codes(flat)
    is_bias = jax.tree.leaves(trees.mask(params, bias, expect=None))
    rules = [(layer, depth) for depth, layer in enumerate(layers, 1)]
    depths = _leaves.by_rules(params, rules, default=None)
    inexact = [trees.is_inexact(leaf) for leaf in flat.values()]
    uncovered = [path for path, d, i in zip(flat, depths, inexact, strict=True) if i and d is None]
    if uncovered:
        raise ValueError(
            f"no layer contains {uncovered[:8]}; the output scales exactly only "
            "if every parameter belongs to one layer. Add its selector to layers."
        )
    weights = {d for d, i, b in zip(depths, inexact, is_bias, strict=True) if i and not b}
    weightless = [layers[d - 1] for d in range(1, len(layers) + 1) if d not in weights]
    if weightless:
        raise ValueError(
            f"the layers {weightless[:8]} hold no weight, only what `bias` "
            f"({bias!r}) selects. Give one selector per layer, not per leaf, or pass bias=."
        )
    base = jnp.asarray(alpha)
    base = _numerics.upcast(base if trees.is_inexact(base) else base.astype(jnp.float32))
    out = [
        _leaves.multiply(leaf, base ** (d if b else 1)) if i else leaf
        for leaf, d, b, i in zip(flat.values(), depths, is_bias, inexact, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), out)


def fit_alpha(
    student_outputs: Array, teacher_outputs: Array, *, weights: Array | None = None
) -> Array:
    """The `alpha` that minimizes `sum_b w_b |alpha * student_b - teacher_b|^2`, in closed form.

    `alpha = sum_b w_b <student_b, teacher_b> / sum_b w_b |student_b|^2`; 1 if the student's
    outputs are all zero. It scales *outputs*: for a homogeneous chain of `D` layers
    (`scale_homogeneous`), the coefficient of the parameters is its `D`-th root.

    Args:
      student_outputs: `[B, ...]`.
      teacher_outputs: the same shape.
      weights: `[B]`, 0 for padding.

    Returns:
      `[]`, float32 or wider; differentiable.

    Raises:
      ValueError: if shapes differ or are empty, or `weights` has another batch size.
      TypeError: if the outputs are not floating point.
    """
    _checks.floating(student_outputs=student_outputs, teacher_outputs=teacher_outputs)
    _checks.same_shape(student_outputs=student_outputs, teacher_outputs=teacher_outputs)
    _checks.rank(1, student_outputs=student_outputs)
    _checks.nonempty(student_outputs=student_outputs)
    student = _numerics.upcast(student_outputs)
    teacher = _numerics.upcast(teacher_outputs).astype(student.dtype)
    if weights is not None:
        _checks.rank(1, 1, weights=weights)
        _checks.same_batch(weights=weights, student_outputs=student_outputs)
        weight = _numerics.per_example(weights, student, "weights")
        # A padded example may hold anything, NaN included: select before multiplying.
        student, teacher = (jnp.where(weight != 0, x, 0) for x in (student, teacher))
    else:
        weight = jnp.ones((), student.dtype)
    ratio = _numerics.largest(teacher) / _numerics.largest(student)
    student, teacher = _numerics.rescaled(student), _numerics.rescaled(teacher)
    weighted = weight * student
    power = jnp.sum(weighted * student)
    moment = jnp.sum(weighted * teacher)
    return jnp.where(power > 0, ratio * moment / jnp.where(power > 0, power, 1), 1)
