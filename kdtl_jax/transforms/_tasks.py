"""Task vectors `tau = theta - theta_0`, the change made by fine-tuning, and adding them back.

Merging methods are compositions of three kinds of functions, all on trees: *sparsify* a task vector
(`trim`, `dare`), *elect* signs and combine several (`disjoint_merge`), and *apply* the result to
the base:

    apply_task_vectors(base, [ties(task_vectors, density=0.2)], scale=0.7)

A task vector is kept in float32 or wider whatever the dtype of the leaves, because differences of
half-precision weights would be rounded twice. Leaves that are not inexact have no difference: the
task vector carries those of the fine-tuned model, the merge those of the base.
"""

from collections.abc import Sequence

from kdtl_jax import _numerics
from kdtl_jax._types import Array, Params, PyTree
from kdtl_jax.transforms import _leaves
from kdtl_jax.transforms._leaves import Coefficient, Weights


def task_vector(finetuned: Params, base: Params) -> PyTree:
    """`theta - theta_0`, float32 or wider.

    Args:
      finetuned: parameters after fine-tuning.
      base: parameters before; the same structure and shapes.

    References:
      Ilharco et al., Editing models with task arithmetic, 2022 (2212.04089).
    """
    return _leaves.combine_leaves(
        lambda i, path, after, before: after - before,
        {"finetuned": finetuned, "base": base},
        [],
        keep_dtype=False,
    )


def apply_task_vectors(
    base: Params,
    task_vectors: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    scale: Coefficient = 1.0,
) -> Params:
    """`theta_0 + lambda sum_i w_i tau_i`, cast once, to the base's dtypes.

    A negative weight forgets a task. For mergekit's `normalize`, divide the weights by their sum.

    Args:
      base: parameters to start from.
      weights: 1 each when None, else one per task vector as in `weighted_sum`.
      scale: lambda: a number, traced scalar, or anything that gives one number per leaf; leaves
        that match no rule stay the base's.

    References:
      Ilharco et al., Editing models with task arithmetic, 2022 (2212.04089).
    """
    scales = _leaves.coefficients(scale, base, name="scale")
    by_leaf = _leaves.weights_by_leaf(weights, len(task_vectors), base)

    def formula(i: int, path: str, start: Array, *taus: Array) -> Array:
        if scales[i] is None:
            return start
        total = _leaves.weighted_sum(by_leaf[i], taus)
        return start + _numerics.cast(scales[i], start) * total

    trees_by_name = {"base": base} | _leaves.name_members("task_vectors", task_vectors)
    return _leaves.combine_leaves(formula, trees_by_name, [scales, by_leaf])
