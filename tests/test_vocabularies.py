"""Vocabularies that differ: padded by -inf, and by id map."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import LossCase, divergences, labels, language, predictions, sequence

from kdtl_jax import losses

PADDING = 3
P = jnp.asarray([0.5, 0.3, 0.2])
close = partial(np.testing.assert_allclose, atol=1e-4)

# Rows that take no logits: log-probabilities of tokens and chunks, scores, sorted probabilities.
OF_NUMBERS = """
sampled_reverse_kl policy_gradient clipped_policy_gradient kl_k2 kl_k3 alm alm_limit margin_mse
sorted_l1
""".split()
# `test_language_losses` pads these, in chunks too.
IN_CHUNKS = """
forward_kl reverse_kl soft_cross_entropy jsd_gkd jsd_normalized jsd_normalized_forward_end
jsd_normalized_reverse_end skew_forward_kl skew_reverse_kl total_variation adaptive_kl_weight
student_top_k_reverse_kl entropy_aware_kl entropy_aware_kl_top_k random_sampling_cross_entropy
top_k_kl_tail top_k_kl_renormalized top_k_kl_teacher_renormalized top_k_kl_truncated
top_k_kl_sampled taid uld uld_w1 lk_alpha lk_lambda
""".split()
ROWS = {
    name: case
    for module in (divergences, labels, language, predictions, sequence)
    for name, case in module.CASES.items()
    if name not in OF_NUMBERS + IN_CHUNKS
}


def padded(x: Any) -> jax.Array:
    """A vocabulary of more classes, none of which is real."""
    x = jnp.asarray(x)
    is_logits = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1 and x.shape[-1] > 2
    fill = [(0, 0)] * (x.ndim - 1) + [(0, PADDING)]
    return jnp.pad(x, fill, constant_values=-jnp.inf) if is_logits else x


def with_padding(name: str, case: LossCase) -> LossCase:
    """The row with what it knows about classes filled up to the padded vocabulary."""
    hyper = dict(case.hyper)
    if name == "tf_kd":  # a teacher made for the real classes
        return case._replace(fn=of_virtual_teacher)
    if "class_weights" in hyper:
        hyper["class_weights"] = np.append(hyper["class_weights"], np.ones(PADDING))
    if "cost" in hyper:
        hyper["cost"] = np.pad(hyper["cost"], (0, PADDING))
    return case._replace(hyper=hyper)


def of_virtual_teacher(
    student: jax.Array, drawn: jax.Array, *, correct_probability: float, temperature: float
) -> jax.Array:
    classes = student.shape[-1] - PADDING
    virtual = losses.virtual_teacher(drawn, classes, correct_probability=correct_probability)
    virtual = losses.without_padding(virtual, size=classes, width=student.shape[-1])
    return losses.kd_kl(student, virtual, temperature=temperature)


def outcomes(cases: dict[str, LossCase], floats: Any, others: Any) -> Any:
    """The values of all rows, and the gradients of a sum in which each has its own weight."""

    def total(floats: Any) -> tuple[jax.Array, Any]:
        values = {}
        for name, case in cases.items():
            args = [a if b is None else b for a, b in zip(floats[name], others[name], strict=True)]
            values[name] = case.fn(*args, **case.hyper)
        weighted = (
            jnp.sum(v * jnp.arange(1.0, v.size + 1).reshape(v.shape)) for v in values.values()
        )
        return sum(weighted, jnp.zeros(())), values

    return jax.grad(total, has_aux=True)(floats)


@pytest.mark.usefixtures("x64")
def test_padding_by_minus_infinity_changes_no_value_and_no_gradient() -> None:
    """All losses in one program: the columns that were added have gradient 0."""
    rng = np.random.default_rng(0)
    examples = {name: case.example(rng, 4) for name, case in ROWS.items()}

    def is_float(x: Any) -> bool:
        return np.asarray(x).dtype.kind == "f"

    floats = {n: [x if is_float(x) else None for x in args] for n, args in examples.items()}
    others = {n: [None if is_float(x) else x for x in args] for n, args in examples.items()}
    slopes, values = jax.jit(partial(outcomes, ROWS))(floats, others)
    cases = {name: with_padding(name, case) for name, case in ROWS.items()}
    actual = jax.jit(partial(outcomes, cases))(jax.tree.map(padded, floats), others)
    for name in ROWS:
        np.testing.assert_allclose(
            actual[1][name], values[name], rtol=1e-9, atol=1e-12, err_msg=name
        )
        for wide, slope in zip(actual[0][name], slopes[name], strict=True):
            if slope is None:
                continue
            size = slope.shape[-1]
            close(wide[..., :size], slope, rtol=1e-7, atol=1e-10, err_msg=name)
            assert not np.any(wide[..., size:]), name


def test_what_one_side_alone_excludes_counts_for_it_as_nothing() -> None:
    """Correlations of probabilities compare with 0; directions of logits have no answer."""
    s = jnp.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    t = s.at[:, 2].set(-jnp.inf)
    far = s.at[:, 2].set(-200.0)
    for loss in (losses.dist_inter, losses.dist_intra, losses.class_correlation):
        close(loss(s, t), loss(s, far), atol=1e-6)
    assert np.isnan(losses.skd_direction(s, t)).all()


def test_shared_vocabulary_sees_mass_that_leaves_it() -> None:
    ours, theirs = losses.shared_vocabulary(
        jnp.log(P),
        jnp.log(jnp.asarray([0.3, 0.1, 0.5, 0.1])),
        jnp.asarray([0, 1]),
        jnp.asarray([2, 0]),
    )
    close(jnp.exp(ours), [0.5, 0.3, 0.2], atol=1e-6)
    close(jnp.exp(theirs), [0.5, 0.3, 0.2], atol=1e-6)
    close(jnp.exp(losses.log_mass(jnp.log(P), jnp.asarray([True, False, True]))), 0.7, atol=1e-6)
    assert np.isneginf(losses.by_id(jnp.log(P), jnp.asarray([1, -1]))[1])
    at = losses.top_k_at(jnp.log(P), jnp.asarray([2, 0]))
    close(jnp.exp(at.log_probs), [0.2, 0.5], atol=1e-6)
    close(jnp.exp(at.log_tail), 0.3, atol=1e-6)
