"""The pieces around token losses: shifts, alignment, top-k teachers, TAID's schedule."""

import bisect
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import language, losses

RNG = np.random.default_rng(0)
FULL_KL: Any = jax.jit(losses.forward_kl)


@hypothesis.given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(1, 12), min_size=1, max_size=8, unique=True),
)
def test_aligned_groups_are_bounded_by_the_common_ends(left: list[int], right: list[int]) -> None:
    ends = [np.sort(side) for side in (left, right)]
    student, teacher, count = language.align_tokens(ends[0], ends[1])
    common = sorted(set(left) & set(right))
    both_go_on = all(not common or side[-1] > common[-1] for side in ends)
    assert count == len(common) + both_go_on
    for groups, side in ((student, ends[0]), (teacher, ends[1])):
        for group, end in zip(groups, side, strict=True):
            nth = bisect.bisect_left(common, end)
            assert group == (nth if nth < count else -1)


def test_alignment_refuses_ends_that_fall() -> None:
    with pytest.raises(ValueError, match="student_ends must not decrease"):
        language.align_tokens(np.asarray([3, 2]), np.asarray([3]))


def test_a_merged_group_is_the_probability_of_the_text_that_continues() -> None:
    p = RNG.dirichlet(np.ones(4), size=5)
    tokens, groups = np.asarray([1, 3, 0, 2, 2], np.int32), np.asarray([0, 0, 1, 1, -1], np.int32)
    got = language.merge_tokens(jnp.log(p), jnp.asarray(tokens), jnp.asarray(groups), num_groups=2)
    np.testing.assert_allclose(np.exp(got), [p[1] * p[0, 1], p[3] * p[2, 0]], rtol=1e-5)


def test_causal_shift_pairs_each_position_with_the_token_after_it() -> None:
    """Logits that predict exactly the next token: shifted the loss is small, unshifted large."""
    labels = jnp.asarray([[2, 0, 1, -100], [1, 1, 3, 2]], jnp.int32)
    after = np.asarray([[0, 1, 0, 0], [1, 3, 2, 0]])
    logits = jnp.asarray(20 * np.eye(4)[after], jnp.float32)
    shifted = losses.causal_shift(logits, labels)
    np.testing.assert_array_equal(shifted.where, [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(shifted.labels, [[0, 1, 0], [1, 3, 2]])
    scores = np.asarray(losses.token_log_probs(shifted.logits, shifted.labels))
    assert scores[np.asarray(shifted.where)].min() > -1e-6
    unshifted = losses.token_log_probs(logits[:, :-1], jnp.maximum(labels[:, :-1], 0))
    assert np.mean(unshifted) < -5
    with pytest.raises(ValueError, match="L > 1"):
        losses.causal_shift(logits[:, :1], labels[:, :1])


def test_token_log_probs_is_minus_the_cross_entropy() -> None:
    logits = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    tokens = jnp.asarray(RNG.integers(0, 5, size=(2, 3)), jnp.int32)
    want = -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    np.testing.assert_allclose(losses.token_log_probs(logits, tokens), want, rtol=1e-5)


def test_answers_first_rotates_the_prompt_away() -> None:
    labels = jnp.asarray([[-100, -100, 7, 8], [5, 6, -100, -100]], jnp.int32)
    values = jnp.arange(16.0).reshape(2, 4, 2)
    rotated, where = losses.answers_first(values, labels)
    np.testing.assert_array_equal(rotated[0], values[0, jnp.asarray([2, 3, 0, 1])])
    np.testing.assert_array_equal(rotated[1], values[1])
    np.testing.assert_array_equal(where, [[True, True, False, False]] * 2)
    with pytest.raises(ValueError, match="must begin with the labels' shape"):
        losses.answers_first(values[:1], labels)


def test_the_taid_teacher_walks_from_the_student_to_the_teacher() -> None:
    s, t = (jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    t = t.at[0, 1].set(-jnp.inf)
    start = losses.taid_teacher(s, t, progress=0.0)
    np.testing.assert_array_equal(start, s.at[0, 1].set(-jnp.inf))
    np.testing.assert_array_equal(losses.taid_teacher(s, t, progress=1.0), t)
    each = losses.taid_teacher(s, t, progress=jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(each[1], (s[1] + t[1]) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="progress must lie in"):
        losses.taid_teacher(s, t, progress=1.5)


def test_taid_advances_faster_while_the_loss_falls_and_ends_at_the_end() -> None:
    """Algorithm 1 of the paper, as a loop."""
    steps, alpha, beta = 20, 0.05, 0.9

    def run(values: np.ndarray) -> np.ndarray:
        def body(state: Any, loss: jax.Array) -> Any:
            state = losses.taid_advance(state, loss, num_steps=steps, alpha=alpha, beta=beta)
            return state, state.progress

        return np.asarray(jax.lax.scan(body, losses.taid_start(), jnp.asarray(values))[1])

    falling = (3.0 * 0.8 ** np.arange(steps + 1)).astype(np.float32)
    want, t, m, last = [], 0.4, 0.0, None
    for step, loss in enumerate(falling.astype(np.float64)):
        if last is not None:
            m = beta * m + (1 - beta) * (last - loss) / last
            ahead = t + alpha / (1 + np.exp(-m)) * (1 - t)
            t = min(1.0, max(0.4 + 0.6 * step / steps, ahead))
        last = loss
        want.append(t)
    got = run(falling)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[-1] == 1 and (np.diff(got) >= 0).all()
    assert (got >= run(np.full_like(falling, 3.0)) - 1e-6).all()


def test_distillm2_skews_less_where_the_sides_are_far_apart() -> None:
    p, reference = np.asarray([0.9, 0.5, 0.2]), np.asarray([0.1, 0.4, 0.3])
    got = losses.distillm2_alpha(jnp.log(p), jnp.log(reference), anchor=0.75, base=0.4)
    want = 1 - 0.6 * 0.75 / (p - reference + 1e-5)
    np.testing.assert_allclose(got, np.clip(want, 0.01, 0.4), rtol=1e-5)
    assert 0.01 == pytest.approx(float(got[1])) and got[0] == np.float32(0.4)
    with pytest.raises(TypeError, match="log_prob must be floating point"):
        losses.distillm2_alpha(jnp.ones(3, jnp.int32), jnp.log(reference), anchor=0.75)


def dense() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 6, 9)).astype(np.float32)
    return jnp.asarray(student), jnp.asarray(teacher)


def test_top_k_targets_hold_all_the_mass() -> None:
    _, teacher = dense()
    targets = losses.top_k_targets(teacher, k=4, temperature=2.0)
    p = np.asarray(jax.nn.softmax(teacher / 2))
    np.testing.assert_allclose(np.exp(targets.log_probs), -np.sort(-p)[:, :4], rtol=1e-5)
    np.testing.assert_allclose(np.exp(targets.log_tail), np.sort(p)[:, :5].sum(-1), rtol=1e-5)
    again = losses.stored_top_k(targets.indices, targets.log_probs)
    np.testing.assert_allclose(again.log_tail, targets.log_tail, rtol=1e-4)
    everything = losses.top_k_targets(teacher, k=9)
    assert bool(jnp.all(everything.log_tail == -jnp.inf))
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.9"):
        losses.top_k_targets(teacher, k=10)


@pytest.mark.parametrize(
    "loss",
    [
        losses.top_k_kl_tail,
        losses.top_k_buckets,
        losses.hinge_ranking,
        losses.in_student_top_k,
        lambda student, targets: losses.soften_top_k(targets, temperature=2.0),
    ],
)
def test_targets_that_are_logits_are_refused(loss: Any) -> None:
    student, teacher = dense()
    with pytest.raises(TypeError, match="targets must be a TopK, got "):
        loss(student, teacher)


@pytest.mark.parametrize(
    "of",
    [
        lambda student, none: losses.top_k_at(student, none),
        lambda student, none: losses.stored_top_k(none, jnp.zeros(none.shape)),
        *(
            lambda student, none, loss=loss: loss(
                student, losses.TopK(none, jnp.zeros(none.shape), jnp.zeros(none.shape[:-1]))
            )
            for loss in (losses.top_k_kl_tail, losses.hinge_ranking, losses.top_k_kl_renormalized)
        ),
    ],
)
def test_targets_of_no_class_are_refused(of: Any) -> None:
    student, _ = dense()
    none = jnp.zeros((*student.shape[:-1], 0), jnp.int32)
    with pytest.raises(ValueError, match=r"at least one class in a row \(k >= 1\), got indices\["):
        of(student, none)


def test_softening_stored_targets_is_exact_without_a_tail_and_for_a_flat_one() -> None:
    _, teacher = dense()
    whole = losses.soften_top_k(losses.top_k_targets(teacher, k=9), temperature=3.0)
    want = losses.top_k_targets(teacher, k=9, temperature=3.0)
    np.testing.assert_allclose(whole.log_probs, want.log_probs, rtol=1e-5, atol=1e-6)
    flat = jnp.asarray([[3.0, 2.0, 1.0, -1.0, -1.0, -1.0]], jnp.float32)
    softer = losses.soften_top_k(losses.top_k_targets(flat, k=3), temperature=2.5, tail_classes=3)
    want = losses.top_k_targets(flat, k=3, temperature=2.5)
    np.testing.assert_allclose(softer.log_probs, want.log_probs, rtol=1e-5)
    np.testing.assert_allclose(softer.log_tail, want.log_tail, rtol=1e-5)


@pytest.mark.parametrize(
    "divergence", [losses.forward_kl, losses.reverse_kl, losses.jensen_shannon]
)
def test_coarser_distributions_are_never_further_apart(divergence: Any) -> None:
    student, teacher = dense()
    buckets = losses.top_k_buckets(student, losses.top_k_targets(teacher, k=4))
    assert bool(jnp.all(divergence(*buckets) <= divergence(student, teacher) + 1e-6))


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_what_each_top_k_loss_sees_of_mass_that_leaves_the_set(shift: float) -> None:
    """All of the teacher's k logits moved together: the tail bucket alone sees all of it."""
    _, teacher = dense()
    targets = losses.top_k_targets(teacher, k=4)
    inside = jnp.any(jax.nn.one_hot(targets.indices, 9, dtype=jnp.bool_), axis=-2)
    student = jnp.where(inside, teacher + shift, teacher)
    full = FULL_KL(student, teacher)
    np.testing.assert_allclose(losses.top_k_kl_tail(student, targets), full, rtol=1e-4)
    assert np.abs(losses.top_k_kl_renormalized(student, targets)).max() < 1e-6
    zeroed = np.asarray(losses.top_k_kl_teacher_renormalized(student, targets))
    assert (zeroed > full).all() if shift < 0 else (zeroed < full).all()
    truncated = np.asarray(losses.top_k_kl_truncated(student, targets))
    assert (truncated > full).all() if shift < 0 else (truncated < 0).all()


def test_the_sampled_loss_has_the_forward_kl_as_its_mean() -> None:
    student, teacher = dense()
    log_p = jax.nn.log_softmax(teacher)
    order = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), log_p.shape)

    def of_class(c: int) -> jax.Array:
        tail = jnp.zeros_like(log_p[:, 0])
        targets = losses.TopK(order[:, c : c + 1], log_p[:, c : c + 1], tail)
        return losses.top_k_kl_sampled(student, targets)

    mean = sum(np.exp(log_p[:, c]) * np.asarray(of_class(c)) for c in range(9))
    np.testing.assert_allclose(mean, FULL_KL(student, teacher), rtol=1e-4, atol=1e-6)
