"""Fine-tuning policies: layer-wise learning rates, gradual unfreezing, carrying state over.

Learning-rate policies are trees of multipliers, made once from *all* the parameters, so a rule that
covers nothing, or a leaf that no rule covers, raises a ValueError. The optimizer may later see only
a trainable partition: leaves are found by path. Of ordered rules `[(selector, value), ...]`, the
first match wins. One optax transform applies the multipliers. Put it last, after the learning rate:

    multipliers = layer_decay(layer_ids(params, stem=..., block=..., head=...), decay=0.75)
    tx = optax.chain(optax.adamw(schedule), scale_by_multipliers(multipliers))

(or `by_layer(params, ..., decay=0.75)` for both lines).

To freeze parameters permanently, do not use a policy: pass `trainable=selector` to the step, which
then computes no gradient for them. Frozen batch statistics are `normalization.freeze_stats`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import _checks, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar


def layer_ids(
    params: Params,
    *,
    stem: trees.Selector,
    block: str,
    head: trees.Selector,
    last: trees.Selector | None = None,
    stacked: trees.Selector | None = None,
) -> PyTree:
    """The layer of every leaf: 0 for the stem, i + 1 for block i, `depth + 1` for the head.

    Args:
      params: all the parameters, concrete or abstract.
      stem: embeddings and everything else below the first block.
      block: regular expression for the blocks' paths with the block's number as its only group:
        `r"(?:.*/)?blocks_(\\d+)/.*"`. Numbers are ordered as numbers: 10 follows 9.
      head: the new layers, usually the classifier (BEiT also counts the final norm).
      last: leaves that share the last block's layer (timm's final norm).
      stacked: leaves `[depth, ...]` of scanned blocks; entry i of their leading axis is layer i +
        1.

    Returns:
      A tree of ints, and for stacked leaves int arrays `[depth, 1, ...]`.

    Raises:
      ValueError: if a leaf is covered by none of the above, a selector matches no leaf, or `block`
        is not a regular expression with a number as its only group.

    References:
      timm's `param_groups_layer_decay` and BEiT's `LayerDecayValueAssigner` (2106.08254).
    """
    flat = trees.flatten(params)
    block_numbers = _block_numbers(block, list(flat))
    depth = 1 + max(block_numbers.values(), default=-1)
    if stacked is not None:
        scanned = trees.flatten(trees.mask(params, stacked))
        lengths = {np.shape(flat[path])[0] for path, is_stacked in scanned.items() if is_stacked}
        if len(lengths) > 1 or depth:
            raise ValueError(
                f"stacked leaves must have one leading length and exclude numbered "
                f"blocks, got lengths {sorted(lengths)} and {depth} numbered blocks."
            )
        depth = lengths.pop()
    if depth == 0:
        raise ValueError(
            f"block={block!r} matches no path; nearest: {trees.nearest(block, list(flat))}."
        )
    rules: list[tuple[trees.Selector, Any]] = [(stem, 0)]
    rules += [(lambda path, leaf: path in block_numbers, "block")] if block_numbers else []
    rules += [(stacked, "stacked")] if stacked is not None else []
    rules += [(last, depth)] if last is not None else []
    rules += [(head, depth + 1)]
    labels = trees.labels(params, rules)

    def number(path: str, leaf: Any, label: Any) -> Any:
        if label == "block":
            return block_numbers[path] + 1
        if label == "stacked":
            return np.arange(1, depth + 1).reshape(-1, *(1,) * (np.ndim(leaf) - 1))
        return label

    return trees.map_with_path(number, params, labels)


def _block_numbers(block: str, paths: Sequence[str]) -> dict[str, int]:
    """`{path: number}` for the paths in a block."""
    try:
        pattern = re.compile(block)
    except re.error as error:
        raise ValueError(f"block must be a regular expression, got {block!r}: {error}.") from None
    if pattern.groups != 1:
        raise ValueError(f"block must have one group, the number; got {block!r}.")
    numbers = {path: m[1] for path in paths if (m := pattern.fullmatch(path)) is not None}
    for path, number in numbers.items():
        if not (number or "").isdecimal():
            raise ValueError(
                f"block's group must be the number, got {number!r} from {path!r}. "
                r"Write (\d+) there."
            )
    return {path: int(number) for path, number in numbers.items()}


def layer_decay(
    ids: PyTree, *, decay: float = 0.75, min_scale: float = 0.0, top: int | None = None
) -> PyTree:
    """`max(min_scale, decay^(top - id))`: the head's multiplier is 1, the stem's `decay^top`.

    Args:
      ids: from `layer_ids`, or any tree of ints (and int arrays).
      decay: in (0, 1].
      min_scale: floor.
      top: the id with multiplier 1; None means the largest id.

    Returns:
      A tree of floats, and of float32 arrays where the ids are arrays.

    Raises:
      ValueError: if decay lies outside (0, 1], an id lies above `top`, or there are no ids.

    References:
      Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021 (2106.08254); timm.
    """
    _checks.scalar(decay=decay, min_scale=min_scale)
    _checks.positive(decay=decay)
    _checks.within(0, 1, decay=decay)
    _checks.within(0, 1, min_scale=min_scale)
    if not jax.tree.leaves(ids):
        raise ValueError(f"ids must have leaves, got {ids!r}. Make it by layer_ids.")
    highest = max(int(np.max(leaf)) for leaf in jax.tree.leaves(ids))
    if top is not None:
        _checks.count(0, top=top)
    top = highest if top is None else top
    if highest > top:
        raise ValueError(f"a layer has id {highest}, above top={top}.")

    def multiplier(layer: Any) -> Any:
        scale = np.maximum(min_scale, np.float64(decay) ** (top - np.asarray(layer)))
        return float(scale) if scale.ndim == 0 else scale.astype(np.float32)

    return jax.tree.map(multiplier, ids)


def by_layer(
    params: Params,
    *,
    stem: trees.Selector,
    block: str,
    head: trees.Selector,
    last: trees.Selector | None = None,
    stacked: trees.Selector | None = None,
    decay: float = 0.75,
) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay in one call; put it last in the chain.

        optax.chain(optax.adamw(1e-4), by_layer(params, stem=..., block=..., head=...))

    The arguments and errors are those of `layer_ids` and `layer_decay`; the multipliers are applied
    by `scale_by_multipliers`.
    """
    ids = layer_ids(params, stem=stem, block=block, head=head, last=last, stacked=stacked)
    return scale_by_multipliers(layer_decay(ids, decay=decay))


def discriminative_rates(ids: PyTree, *, factor: float = 2.6) -> PyTree:
    """`factor^-(top - id)`: each layer learns `factor` times slower than the one above.

    Raises:
      ValueError: if the factor is not finite and at least 1.

    References:
      Howard and Ruder, ULMFiT, 2018 (1801.06146), section 3.2.
    """
    _checks.scalar(factor=factor)
    _checks.positive(factor=factor)
    _checks.within(1, float("inf"), factor=factor)
    return layer_decay(ids, decay=1 / factor)


def multipliers(params: Params, rules: trees.Rules) -> PyTree:
    """One learning-rate multiplier per leaf from ordered rules.

    `[("head/.*", 1.0), (".*", 0.1)]` is the usual 0.1 for the backbone;
    `[(".*/b", 16.0), (".*/a", 1.0)]` on an adapter's weights is LoRA+.
    """
    _checks.non_negative(**_names_for_messages("multiplier", rules))
    return trees.labels(params, rules)


def _names_for_messages(quantity: str, rules: trees.Rules) -> dict[str, Any]:
    return {f"the {quantity} of {selector!r:.80}": value for selector, value in rules}


def scale_by_multipliers(by_leaf: PyTree) -> optax.GradientTransformation:
    """A stateless transform that multiplies every update by its leaf's multiplier.

    `by_leaf` is a tree of numbers or broadcastable arrays. An update without a multiplier raises
    ValueError, from `init` and `update`.
    """
    table = trees.flatten(by_leaf)

    def init(params: Params) -> optax.EmptyState:
        _look_up(table, params)
        return optax.EmptyState()

    def multiply(factor: Scalar, update: Array) -> Array:
        return jnp.asarray(factor).astype(update.dtype) * update

    def update(updates: PyTree, state: Any, params: Params | None = None) -> tuple[PyTree, Any]:
        return jax.tree.map(multiply, _look_up(table, updates), updates), state

    return optax.GradientTransformation(init, update)


def optimizers(params: Params, rules: trees.Rules) -> optax.GradientTransformation:
    """One optimizer per leaf from ordered rules `[(selector, tx), ...]` that cover every leaf.

    Equal transforms under two rules keep separate states, and norms (clipping) are taken per rule.
    """
    numbered = [(selector, str(i)) for i, (selector, _) in enumerate(rules)]
    table = trees.flatten(trees.labels(params, numbered))
    # A rule whose leaves are all outside the trainable partition does nothing.
    return optax.partition(
        {str(i): tx for i, (_, tx) in enumerate(rules)}, partial(_look_up, table)
    )


class GateState(NamedTuple):
    """The number of updates so far."""

    step: Array


def unfreeze_gate(params: Params, rules: trees.Rules) -> optax.GradientTransformation:
    """Gradual unfreezing: a leaf's updates are 0 before its step and unchanged from then on.

    One compiled step serves the whole schedule and the optimizer's moments are kept, because
    the gate only multiplies updates. Put it last in the chain (after weight decay), so that a
    frozen leaf stays bit-identical and its moments are warm when it is unfrozen. If it is also
    placed before clipping, frozen gradients do not enter the norm:

        optax.chain(optax.adamw(1e-3), unfreeze_gate(params, [("head/.*", 0), (".*", 500)]))

    The backward pass covers all parameters. To compute gradients for the trainable part only,
    change the step's `trainable` selector between stages and carry the state over
    (`carry_opt_state`). The rules are `[(selector, first step), ...]`; steps count from 0.

    References:
      Howard and Ruder, ULMFiT, 2018 (1801.06146), section 3.3.
    """
    _checks.count(0, **_names_for_messages("first step", rules))
    first_steps = trees.flatten(trees.labels(params, rules))

    def init(params: Params) -> GateState:
        _look_up(first_steps, params)
        return GateState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: Any, params: Params | None = None
    ) -> tuple[PyTree, GateState]:
        def gate(first_step: int, leaf: Array) -> Array:
            return jnp.where(state.step >= first_step, leaf, jnp.zeros((), leaf.dtype))

        gated = jax.tree.map(gate, _look_up(first_steps, updates), updates)
        return gated, GateState(state.step + 1)

    return optax.GradientTransformation(init, update)


def lp_ft(
    params: Params, *, head: trees.Selector, probe_steps: int
) -> optax.GradientTransformation:
    """Linear probing, then fine-tuning: the head alone for `probe_steps`, then everything.

    Raises:
      ValueError: if `probe_steps` is negative.
      TypeError: if `probe_steps` is not a whole number.

    References:
      Kumar et al., Fine-Tuning can Distort Pretrained Features, 2022 (2202.10054).
    """
    _checks.count(0, probe_steps=probe_steps)
    return unfreeze_gate(params, [(head, 0), (trees.everything, probe_steps)])


class Carried(NamedTuple):
    """A new optimizer state with the old one's entries, and which paths were carried over."""

    state: PyTree
    carried: tuple[str, ...]
    fresh: tuple[str, ...]


def carry_opt_state(old: PyTree, new: PyTree) -> Carried:
    """Moves an optimizer's state to a different trainable partition: equal paths are carried over.

    Args:
      old: the state so far.
      new: `tx.init` of the new partition, of the same optimizer.

    Returns:
      The state (structure, shapes and dtypes of `new`) and the paths that were carried over and
      those that start fresh. Fresh Adam moments are used with the old step count, whose bias
      correction has ended: their first updates are up to `(1 - b1) / sqrt(1 - b2)`, 3.2 times the
      usual size. Warm up the learning rate, or use `unfreeze_gate`, whose moments are warm.

    Raises:
      ValueError: if nothing could be carried over, or a carried leaf has changed its shape.
    """
    old_leaves, new_leaves = trees.flatten(old), trees.flatten(new)
    shared = [path for path in new_leaves if path in old_leaves]
    if not shared and new_leaves:
        raise ValueError(
            "the two states share no path; were they made by the same optimizer? "
            f"Old: {list(old_leaves)[:4]}, new: {list(new_leaves)[:4]}."
        )
    _checks.same_leaves(
        old={p: old_leaves[p] for p in shared}, new={p: new_leaves[p] for p in shared}
    )
    leaves = [
        jax.lax.convert_element_type(old_leaves[path], leaf.dtype) if path in old_leaves else leaf
        for path, leaf in new_leaves.items()
    ]
    fresh = tuple(path for path in new_leaves if path not in old_leaves)
    state = jax.tree.unflatten(jax.tree.structure(new), leaves)
    return Carried(state, tuple(shared), fresh)


def _look_up(table: Mapping[str, Any], tree: PyTree) -> PyTree:
    """The table's entries for the leaves of a tree, by path."""
    for path in trees.leaf_paths(tree):
        if path not in table:
            raise ValueError(
                f"no rule was made for {path!r}; nearest paths: "
                f"{trees.nearest(path, list(table))}. Make the rules from all the parameters."
            )
    return trees.map_with_path(lambda path, _: table[path], tree)
