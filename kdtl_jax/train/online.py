"""Distillation without a pretrained teacher: mutual, self, born-again, and with assistants.

Each is a few lines on top of the losses; a paper adds which network teaches which, and where the
gradient stops. The teaching side is always under `stop_gradient` here: unlike the losses, these
functions decide which side teaches. Functions named `..._terms` return `{name: [B]}` for the
objective. Their `labels` are int `[B]`, and `where` says which examples are real, bool `[B]`
(`inputs.real`); the labels of the others may be anything. They raise ValueError if shapes do not
fit.

    >>> import jax, jax.numpy as jnp, optax
    >>> from kdtl_jax import train
    >>> from kdtl_jax.train import ensembles, online
    >>> def model(params, model_state, inputs, *, key=None, train=False):
    ...     return {"logits": inputs @ params["w"]}, model_state
    >>> def terms(inputs):
    ...     return online.mutual_terms(inputs.student["logits"], inputs.batch["labels"])
    >>> peers, tx = ensembles.vmap_teacher(model), optax.sgd(1.0)
    >>> step = train.make_step(peers, terms, {"task": 1.0, "mutual": 1.0}, tx)
    >>> both = ensembles.stack_teachers([{"w": jnp.eye(2)}, {"w": -jnp.eye(2)}])
    >>> state = train.init_state(both, tx, key=jax.random.key(0))
    >>> state, metrics = step(state, {"inputs": jnp.eye(2), "labels": jnp.array([0, 1])})
    >>> sorted(metrics)
    ['loss', 'mutual', 'task']
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax, losses
from kdtl_jax._types import Params, Scalar
from kdtl_jax.train import ensembles

Trainer = Callable[[Params | None, Array], Params]  # (teacher parameters, key) -> parameters


def mutual_terms(
    logits: Array, labels: Array, *, temperature: Scalar = 1.0, where: Array | None = None
) -> dict[str, Array]:
    """Deep mutual learning: `CE_k + mean over l != k of T^2 KL(p_l || p_k)`, summed over peers.

    Peers of one architecture are stacked parameters, run by `ensembles.vmap_teacher`. All are
    updated at once; the paper updates them in turn.

    Args:
      logits: `[K, B, num_classes]`, K >= 2 peers.
      temperature: 1 in the paper.

    Returns:
      `{"task": [B], "mutual": [B]}`.

    Raises:
      ValueError: if there are fewer than two peers.

    References:
      Zhang et al., Deep Mutual Learning, 2017 (1706.00384).
    """
    _checks.rank(3, 3, logits=logits)
    peers = logits.shape[0]
    if peers < 2:
        raise ValueError(f"expected at least two peers, got {_checks.described(logits=logits)}.")
    targets = jax.lax.stop_gradient(logits)

    def mutual_loss(student: Array) -> Array:
        kl = jax.vmap(lambda peer: losses.kd_kl(student, peer, temperature=temperature))(targets)
        return jnp.sum(kl, axis=0) / (peers - 1)  # a peer's KL to itself is exactly 0

    return {
        "task": _cross_entropies(logits, labels, where),
        "mutual": jnp.sum(jax.vmap(mutual_loss)(logits), axis=0),
    }


def one_terms(
    branches: Array,
    scores: Array,
    labels: Array,
    *,
    temperature: Scalar = 3.0,
    where: Array | None = None,
) -> dict[str, Array]:
    """ONE: branches, their gated ensemble, and `T^2 KL(ensemble || branch)` over branches.

    Args:
      branches: `[K, B, num_classes]` logits.
      scores: `[B, K]` of the gate (see `ensembles.gated_logits`).
      temperature: 3 in the paper.

    Returns:
      `{"task": [B], "ensemble": [B], "distill": [B]}`, all with weight 1 in the paper. The gate
      learns only from "ensemble": the ensemble does not follow its branches.

    References:
      Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, 2018 (1806.04606).
    """
    ensemble = ensembles.gated_logits(branches, scores)
    teacher = jax.lax.stop_gradient(ensemble)

    def branch_loss(branch: Array) -> Array:
        return losses.kd_kl(branch.astype(teacher.dtype), teacher, temperature=temperature)

    return {
        "task": _cross_entropies(branches, labels, where),
        "ensemble": _cross_entropies(ensemble[None], labels, where),
        "distill": jnp.sum(jax.vmap(branch_loss)(branches), axis=0),
    }


def self_teaching_terms(
    exits: Sequence[Array],
    labels: Array,
    *,
    features: Sequence[Array] = (),
    temperature: Scalar = 3.0,
    where: Array | None = None,
) -> dict[str, Array]:
    """Be your own teacher: the deepest exit teaches the shallower ones.

    Args:
      exits: `[B, num_classes]` logits of every classifier, the deepest last.
      features: one `[B, D]` per exit, brought to equal size by connectors, the deepest last; if
        empty, the hint is omitted.
      temperature: 3 in the published code.

    Returns:
      `{"task": [B], "distill": [B]}`, sums over exits, and with features `"hint"`, the sum of
      `||f - f_deepest||^2`. The paper's weights are 1 - alpha, alpha and beta: alpha 0.1 and
      beta 1e-6.

    Raises:
      ValueError: if there are fewer than two exits.

    References:
      Zhang et al., Be Your Own Teacher, 2019 (1905.08094).
    """
    if len(exits) < 2 or len(features) not in (0, len(exits)):
        raise ValueError(
            "expected at least two exits and one feature per exit or none, "
            f"got {len(exits)} exits and {len(features)} features."
        )
    teacher = jax.lax.stop_gradient(exits[-1])
    kl = [losses.kd_kl(logits, teacher, temperature=temperature) for logits in exits[:-1]]
    terms = {
        "task": _cross_entropies(jnp.stack(exits), labels, where),
        "distill": jnp.sum(jnp.stack(kl), axis=0),
    }
    if len(features):
        target = jax.lax.stop_gradient(features[-1])
        hints = [_squared_distance(feature, target) for feature in features[:-1]]
        terms["hint"] = jnp.sum(jnp.stack(hints), axis=0)
    return terms


def teacher_chain(
    trainers: Sequence[Trainer], key: Array, *, teacher: Params | None = None
) -> list[Params]:
    """Trains networks in turn, each taught by the previous one: assistants and generations.

    Teacher-assistant distillation (TAKD) is a chain of trainers of decreasing size.

    Args:
      trainers: `(teacher parameters or None, key) -> parameters`, in order. A trainer knows its own
        and its teacher's architecture.
      key: typed PRNG key; trainer i gets `fold_in(key, i)`.
      teacher: parameters of the first network's teacher; None trains it alone.

    Returns:
      The parameters of every network, in order.

    Raises:
      ValueError: if there are no trainers.

    References:
      Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, 2019 (1902.03393).
    """
    _checks.key(key=key)
    if not len(trainers):
        raise ValueError("expected at least one trainer, got none.")
    trained = []
    for i, trainer in enumerate(trainers):
        teacher = trainer(teacher, jax.random.fold_in(key, i))
        trained.append(teacher)
    return trained


def born_again(trainer: Trainer, key: Array, *, generations: int = 3) -> list[Params]:
    """Generations of one architecture, each taught by the previous one; the first learns alone.

    The paper's best result is the ensemble of all generations: stack them with
    `ensembles.stack_teachers` and use `ensembles.mean_logits`.

    Args:
      trainer: `(teacher parameters or None, key) -> parameters`.
      key: typed PRNG key.
      generations: students after the first network.

    Returns:
      `generations + 1` parameter trees, the first network's first.

    Raises:
      ValueError: if `generations` is negative.
      TypeError: if it is not a whole number.

    References:
      Furlanello et al., Born Again Neural Networks, 2018 (1805.04770).
    """
    _checks.count(0, generations=generations)
    return teacher_chain([trainer] * (generations + 1), key)


def _cross_entropies(logits: Array, labels: Array, where: Array | None) -> Array:
    """`[K, B, num_classes], [B] -> [B]`: cross-entropies summed over the first axis."""
    _checks.floating(logits=logits)
    _checks.several_classes(logits=logits)
    _checks.labels(labels, logits[0], where)
    ce = jax.vmap(_softmax.cross_entropy, in_axes=(0, None, None))
    return jnp.sum(ce(logits, labels, where), axis=0)


def _squared_distance(feature: Array, target: Array) -> Array:
    _checks.same_shape(feature=feature, deepest=target)
    difference = _numerics.upcast(feature) - _numerics.upcast(target)
    return jnp.sum(jnp.square(_numerics.batch_flat(difference)), axis=-1)
