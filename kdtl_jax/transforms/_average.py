"""Sums of parameters: interpolation (WiSE-FT), model soups, EMA, and task vectors.

Everything is differentiable in its coefficients and vmappable over them, so a learned soup is
`jax.grad` of a loss of `average(models, jax.nn.softmax(logits))`, and a sweep over `alpha` is one
`jax.vmap`.

A task vector is `tau = theta - theta_0`, the change made by fine-tuning. Merging methods are
compositions of three kinds of functions, all on trees: *sparsify* a task vector (`trim`, `dare`),
*elect* signs and combine several (`disjoint_merge`), and *apply* the result to the base:

    apply_task_vectors(base, [ties(task_vectors, density=0.2)], scale=0.7)

A task vector is kept in float32 or wider whatever the dtype of the leaves, because differences of
half-precision weights would be rounded twice. Leaves that are not inexact have no difference: the
task vector carries those of the fine-tuned model, the merge those of the base.
"""

import math
from collections.abc import Callable, Sequence

import jax

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Params, PyTree, Scalar
from kdtl_jax.transforms import _leaves
from kdtl_jax.transforms._leaves import Coefficient, Weights


def interpolate(source: Params, target: Params, alpha: Coefficient) -> Params:
    """`(1 - alpha) source + alpha target`, leaf by leaf; exact at 0 and 1.

    For WiSE-FT, the source is the zero-shot model and the target the fine-tuned one.

    Args:
      alpha: a coefficient as in `scale`; leaves that match no rule stay the source's.

    References:
      Wortsman et al., Robust fine-tuning of zero-shot models, 2022 (2109.01903), eq. 1.
    """
    values = _leaves.coefficients(alpha, source)

    def formula(i: int, path: str, a: jax.Array, b: jax.Array) -> jax.Array:
        if values[i] is None:
            return a
        share = _numerics.cast(values[i], a)
        return (1 - share) * a + share * b

    return _leaves.combine_leaves(formula, {"source": source, "target": target}, [values])


def weighted_sum(models: Sequence[Params], weights: Weights) -> Params:
    """`sum_i w_i theta_i`, leaf by leaf; the weights are not normalized.

    Args:
      weights: one per model: an array `[N]`, or a list of coefficients as in `scale`.
    """
    trees_by_name = _leaves.name_members("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: jax.Array) -> jax.Array:
        return _leaves.weighted_sum(by_leaf[i], leaves)

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def average(models: Sequence[Params], weights: Weights | None = None) -> Params:
    """`sum_i w_i theta_i / sum_i w_i`, leaf by leaf; without weights, the uniform soup.

    Args:
      weights: None for 1 each, or as in `weighted_sum`; traced weights make a learned soup.

    References:
      Wortsman et al., Model soups, 2022 (2203.05482). mergekit's `linear` is this function with
      `normalize`, and `weighted_sum` without it.
    """
    trees_by_name = _leaves.name_members("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: jax.Array) -> jax.Array:
        _leaves.nonzero_total(path, by_leaf[i])
        shares = [_numerics.cast(w, leaves[0]) for w in by_leaf[i]]
        return _leaves.weighted_sum(by_leaf[i], leaves) / _leaves.total(shares)

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def greedy_soup(
    models: Sequence[Params], score: Callable[[Params], Scalar]
) -> tuple[Params, list[int]]:
    """Averages models greedily, best first, keeping each that does not lower the score.

    Runs on the host: `score` is called `2 N - 1` times, once for every model and trial soup. If no
    score is finite, it raises ValueError.

    Args:
      score: higher is better, usually accuracy on held-out data; a non-finite score never wins.

    Returns:
      `(soup, indices)`: the averaged parameters, and the models in it in the order they were added.

    References:
      Wortsman et al., Model soups, 2022 (2203.05482), recipe 1.
    """
    _leaves.name_members("models", models)
    scores = [float(score(model)) for model in models]
    order = sorted(
        range(len(models)), key=lambda i: -scores[i] if math.isfinite(scores[i]) else math.inf
    )
    if not math.isfinite(scores[order[0]]):
        raise ValueError(f"no model has a finite score, got {scores}.")
    soup, chosen, best = models[order[0]], [order[0]], scores[order[0]]
    for i in order[1:]:
        # From the members each time: a running average in half precision would drift.
        trial = average([models[j] for j in [*chosen, i]])
        trial_score = float(score(trial))
        if best <= trial_score < math.inf:
            soup, best = trial, trial_score
            chosen.append(i)
    return soup, chosen


def ema(shadow: Params, params: Params, *, decay: Scalar = 0.999) -> Params:
    """`decay shadow + (1 - decay) params`: one step of an exponential moving average.

    The shadow keeps its own dtype. Make it float32 when the parameters are in half precision,
    because `1 - decay` is below bfloat16's resolution.

    Args:
      shadow: the average so far; start it as a copy of the parameters.
      params: the same structure and shapes; dtypes may differ.
      decay: a number or traced scalar in `[0, 1]`.

    References:
      Tarvainen and Valpola, Mean teachers are better role models, 2017 (1703.01780).
    """
    _checks.scalar(decay=decay)
    _checks.within(0, 1, decay=decay)
    return interpolate(shadow, params, 1 - decay)


def task_vector(finetuned: Params, base: Params) -> PyTree:
    """`theta - theta_0`, after and before fine-tuning; float32 or wider.

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
      weights: 1 each when None, else one per task vector as in `weighted_sum`.
      scale: lambda; leaves that match no rule stay the base's.

    References:
      Ilharco et al., Editing models with task arithmetic, 2022 (2212.04089).
    """
    scales = _leaves.coefficients(scale, base, name="scale")
    by_leaf = _leaves.weights_by_leaf(weights, len(task_vectors), base)

    def formula(i: int, path: str, start: jax.Array, *taus: jax.Array) -> jax.Array:
        if scales[i] is None:
            return start
        total = _leaves.weighted_sum(by_leaf[i], taus)
        return start + _numerics.cast(scales[i], start) * total

    trees_by_name = {"base": base} | _leaves.name_members("task_vectors", task_vectors)
    return _leaves.combine_leaves(formula, trees_by_name, [scales, by_leaf])
