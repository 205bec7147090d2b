"""What users of language-model trainers ran into, each with its number; and the pieces."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import language, losses
from kdtl_jax.losses import Head
from kdtl_jax.objective import Masked, Mean, reduce
from kdtl_jax.train import ensembles

P, Q = jnp.asarray([0.5, 0.3, 0.2]), jnp.asarray([0.2, 0.3, 0.5])
OF_REVERSE_KL = [0.3207, -0.0825, -0.2382]
close = partial(np.testing.assert_allclose, atol=1e-4)


def expected_gradient(loss: Any) -> jax.Array:
    """Of a loss of one token's log-probabilities, over all tokens that the student may sample."""

    @jax.jit
    def one(z: jax.Array, token: jax.Array) -> jax.Array:
        return loss(jax.nn.log_softmax(z)[token][None], jnp.log(Q[token])[None])[0]

    result = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(jnp.log(P), jnp.arange(3))
    return jnp.sum(P[:, None] * result, axis=0)


def test_expected_gradients_of_sampled_losses() -> None:
    sg = jax.lax.stop_gradient
    close(jax.grad(losses.reverse_kl)(jnp.log(P), jnp.log(Q)), OF_REVERSE_KL)
    close(expected_gradient(lambda s, t: losses.sampled_reverse_kl(s, t, sg(s))), OF_REVERSE_KL)
    close(expected_gradient(losses.kl_k2), OF_REVERSE_KL)
    close(expected_gradient(losses.kl_k3), P - Q, atol=1e-6)
    apart = jnp.asarray([1e-4])
    np.testing.assert_allclose(losses.kl_k3(-apart, 0 * apart), 5.0001667e-9, rtol=1e-6)
    close(expected_gradient(lambda s, t: s - t), 0, atol=1e-6)
    # One divergence for all tokens of a state is a baseline, no advantage.
    close(
        expected_gradient(lambda s, t: losses.policy_gradient(s, 0 * t - 0.7, sg(s))), 0, atol=1e-6
    )
    # Off-policy the ratio makes up for the sampler.
    sampler = jnp.asarray([0.2, 0.2, 0.6])

    def one(z: jax.Array, y: int) -> jax.Array:
        own = jax.nn.log_softmax(z)[y][None]
        return losses.sampled_reverse_kl(own, jnp.log(Q[y])[None], jnp.log(sampler[y])[None])[0]

    result = sum(sampler[y] * jax.grad(one)(jnp.log(P), y) for y in range(3))
    close(result, OF_REVERSE_KL)


@pytest.mark.parametrize(
    ("classes", "sampler"), [([0], P), ([2], Q), ([1, 2], jnp.asarray([0.2, 0.2, 0.6]))]
)
def test_top_k_with_a_sampled_tail_is_the_reverse_kl_on_average(
    classes: list[int], sampler: jax.Array
) -> None:
    targets = losses.stored_top_k(jnp.asarray(classes), jnp.log(Q[jnp.asarray(classes)]))

    def average(z: jax.Array) -> jax.Array:
        each = [
            sampler[y]
            * losses.top_k_reverse_kl_sampled_tail(
                z, targets, jnp.asarray(y), jnp.log(Q[y]), jnp.log(sampler[y])
            )
            for y in range(3)
        ]
        return sum(each, jnp.zeros(()))

    value, gradient = jax.value_and_grad(average)(jnp.log(P))
    close(value, losses.reverse_kl(jnp.log(P), jnp.log(Q)), atol=1e-6)
    close(gradient, OF_REVERSE_KL)


def test_a_class_that_the_teacher_excludes_is_infinitely_far() -> None:
    none = jnp.asarray([-jnp.inf])
    at_one = losses.TopK(jnp.asarray([1]), none, jnp.zeros(()))
    draw = (jnp.asarray(0), jnp.log(Q[0]), jnp.log(P[0]))
    loss = losses.top_k_reverse_kl_sampled_tail
    value, gradient = jax.value_and_grad(loss)(jnp.log(P), at_one, *draw)
    assert value == np.inf
    assert np.isfinite(gradient).all()
    own = jnp.asarray([0.0, -jnp.inf, 0.0])  # the student excludes it too
    assert np.isfinite(loss(own, at_one, *draw))


def test_a_tail_keeps_the_gradient_that_clamping_kills() -> None:
    student, teacher = jnp.log(jnp.asarray([0.6, 0.4])), jnp.log(jnp.asarray([0.9, 0.1]))
    truncated = losses.top_k_kl_truncated(teacher, losses.top_k_targets(student, k=1))
    close(truncated, -0.2433)
    value, gradient = jax.value_and_grad(partial(losses.student_top_k_reverse_kl, k=1))(
        student, teacher
    )
    close(value, 0.3112)
    close(gradient, jax.grad(losses.reverse_kl)(student, teacher), atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def test_identical_half_precision_logits_are_at_distance_0_under_jit() -> None:
    z = 4 * jax.random.normal(jax.random.key(0), (1, 248_320), jnp.bfloat16)
    assert float(jax.jit(losses.reverse_kl)(z, z)[0]) == 0


def test_chunks_see_the_models_own_logits() -> None:
    rng = np.random.default_rng(0)
    hidden, kernel, delta = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((6, 16), (16, 40), (16, 40))
    )
    head = Head(kernel + delta, scale=3.0, softcap=30.0)  # an adapter's delta is in the kernel
    wide = np.asarray(hidden, np.float64) @ np.asarray(kernel + delta, np.float64)
    logits = losses.head_logits(hidden, head)
    assert logits.dtype == jnp.float32
    apart = Head(kernel, scale=3.0, softcap=30.0, delta=(jnp.eye(16, dtype=delta.dtype), delta))
    parts = [np.asarray(hidden, np.float64) @ np.asarray(w, np.float64) for w in (kernel, delta)]
    unrounded = 30 * np.tanh(sum(parts) * 3 / 30)
    close(losses.head_logits(hidden, apart), unrounded, rtol=1e-6, atol=3e-6)
    close(logits, 30 * np.tanh(wide * 3 / 30), rtol=1e-6, atol=1e-6)
    other = Head(kernel)
    jsd = partial(losses.jsd_gkd, beta=0.5)

    @jax.jit
    def chunked(against: Head) -> Any:
        return losses.chunked_divergence(jsd, hidden, head, hidden, against, chunk_size=4)

    want = jax.jit(lambda: jnp.mean(jsd(logits, losses.head_logits(hidden, other))))()
    close(chunked(other).value(), want, rtol=1e-6, atol=1e-6)
    same = chunked(head)
    assert abs(float(same.total)) < 1e-9


def test_tokens_merge_by_the_chain_rule() -> None:
    """P(a) = .6, P(. | a) = (.5, .5): the pair's texts have the probability .3 each."""
    rows = jnp.log(jnp.asarray([[0.6, 0.4, 1e-9], [1e-9, 0.5, 0.5]]))
    merged = language.merge_tokens(
        rows, jnp.asarray([0, 2]), jnp.asarray([0, 0], jnp.int32), num_groups=1
    )
    close(jnp.exp(merged), [[0, 0.3, 0.3]], atol=1e-6)
    close(jnp.sum(jnp.exp(merged)), 0.6, atol=1e-6)  # the prefix's own probability
    # A token that no row knows has no probability, least of all that of class 0.
    merge = jax.jit(partial(language.merge_tokens, num_groups=2))
    groups = jnp.asarray([0, 0, 1], jnp.int32)
    unknown = merge(jnp.concatenate([rows, rows[:1]]), jnp.asarray([3, 2, 0]), groups)
    np.testing.assert_array_equal(np.isnan(unknown), [[True] * 3, [False] * 3])


def test_ids_of_another_tokenizer_are_refused() -> None:
    logits = jnp.zeros((1, 3, 8))
    with pytest.raises(ValueError, match="labels must lie in 0..7, got 8..10"):
        losses.token_log_probs(logits, jnp.asarray([[8, 9, 10]]))
    assert np.isnan(jax.jit(losses.token_log_probs)(logits, jnp.asarray([[8, 9, 10]]))).all()
    ours, theirs = {"a": 0, "b": 1, "c": 2}, {"b": 0, "a": 1, "d": 5}
    with pytest.raises(
        ValueError, match="4 tokens have other ids in student and teacher: 'a' is 0 and 1"
    ):
        language.require_same_ids(ours, theirs)
    language.require_same_ids(ours, dict(ours))
    np.testing.assert_array_equal(language.shared_ids(ours, theirs), [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="share no token"):
        language.shared_ids({"a": 0}, {"b": 0})


def test_answers_and_teachers_are_aligned() -> None:
    labels = jnp.asarray([[-100, -100, 3, -100]])  # an answer of one token
    logits = jax.random.normal(jax.random.key(0), (1, 4, 5))

    def loss(z: jax.Array) -> jax.Array:
        shifted = losses.causal_shift(z, labels)
        teacher = jnp.asarray([[-jnp.inf, -1.0, -jnp.inf]])  # a server's padding
        own = losses.token_log_probs(shifted.logits, shifted.labels, where=shifted.where)
        values = losses.sampled_reverse_kl(
            own, teacher, jax.lax.stop_gradient(own), where=shifted.where
        )
        return reduce("opd", Masked(values, shifted.where)).value()

    value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(logits))
    assert np.isfinite(value)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), [[False, True, False, False]])
    assert np.isfinite(gradient).all()


def test_sums_and_counts() -> None:
    first, second = jnp.asarray([[4.0]]), jnp.zeros((1, 3))
    parts = [reduce("hard", values) for values in (first, second)]
    assert Mean(*(jnp.sum(jnp.stack(side)) for side in zip(*parts, strict=True))).value() == 1
    masked = Masked(jnp.asarray([[2.0, 2.0, 0.0, 0.0]]), jnp.asarray([[True, True, False, False]]))
    assert reduce("hidden", masked).value() == 2


def test_a_masked_zero_vector_has_no_gradient() -> None:
    where = jnp.asarray([[True, False]])

    def loss(features: jax.Array) -> jax.Array:
        values = losses.cosine_distance(features, jnp.zeros_like(features).at[:, 0].set(1))
        return reduce("cosine", Masked(values, where)).value()

    features = jnp.asarray([[[1.0, 2.0], [0.0, 0.0]]])
    value, gradient = jax.value_and_grad(loss)(features)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not np.any(gradient[0, 1])


def test_margins_of_logits_not_of_squashed_scores() -> None:
    scores, none = jnp.asarray([0.99, 0.95]), jnp.zeros(2)
    close(jnp.sqrt(losses.margin_mse(none, scores)), 0.04)
    logits = jnp.log(scores / (1 - scores))
    close(jnp.sqrt(losses.margin_mse(none, logits)), 1.651, atol=1e-3)


def test_random_sampling_is_unbiased_where_renormalized_top_k_is_not() -> None:
    uniform, teacher = jnp.zeros(3), jnp.log(P)
    full = jax.grad(losses.soft_cross_entropy)(uniform, teacher)
    close(full, [-0.1667, 0.0333, 0.1333])
    top = jax.grad(losses.top_k_kl_teacher_renormalized)(
        uniform, losses.top_k_targets(teacher, k=2)
    )
    close(top, [-0.2917, -0.0417, 0.3333])
    for exponent in (1.0, 0.5):
        q = jax.nn.softmax(exponent * teacher)
        result = 0.0
        for draws in itertools.product(range(3), repeat=2):
            ids = jnp.asarray(draws)
            targets = losses.random_sampling_targets(teacher, ids, exponent=exponent)
            gradient = jax.grad(losses.random_sampling_cross_entropy)(uniform, targets)
            result += q[draws[0]] * q[draws[1]] * gradient
        close(result, full, atol=1e-6)
    drawn = losses.random_sampling_draws(jax.random.key(0), teacher[None], num_draws=4000)
    close(np.bincount(np.asarray(drawn[0])) / 4000, P, atol=0.03)


def test_chunks_of_text_across_tokenizers() -> None:
    """Numbers of the paper's setting, and chunks that merge up to the next word."""
    student, teacher = jnp.asarray([-3.0]), jnp.asarray([-1.0])
    close(losses.alm(student, teacher, eps=1e-9), 0.008969, atol=1e-6)
    close(losses.alm_limit(student, teacher, eps=1e-9), 0.9014)
    # A teacher that is certain of what the student finds impossible; two that nearly agree.
    own = jnp.asarray([-33.0, -100.0, -2.0002])
    other = jnp.asarray([0.0, 0.0, -2.0])
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(losses.alm_limit(s, other)))(own)
    close(losses.alm_limit(own, other)[:2], [33, 100], atol=1e-4)
    x, y = np.float64(own[2]) - 1e-6, -2 - 1e-6
    exact = y - x + y * np.log(x / y)
    np.testing.assert_allclose(losses.alm_limit(own, other)[2], exact, rtol=1e-5)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    groups = jnp.asarray([[-1, 0, 0, 1, 2]])
    own = jnp.asarray([[-9.0, -1.0, -2.0, -3.0, -4.0]])
    close(language.chunk_log_probs(own, groups, num_chunks=4), [[-3, -3, -4, 0]], atol=1e-6)
    close(language.chunk_lengths(groups, num_chunks=4), [[2, 1, 1, 0]], atol=1e-6)
    closes = jnp.asarray([[False, True, True, False]])
    np.testing.assert_array_equal(language.merge_chunks(groups, closes), [[-1, 0, 0, 0, 1]])


def test_gates_weights_and_returns() -> None:
    now, then = jnp.log(jnp.asarray([0.5, 0.1, 0.9])), jnp.log(jnp.asarray([0.5, 0.6, 0.1]))
    np.testing.assert_array_equal(losses.drop_gate(now, then), [True, False, True])
    np.testing.assert_array_equal(losses.ratio_gate(now, then), [True, False, False])
    close(losses.truncated_ratio(now, then), [1, 1 / 6, 2], atol=1e-6)
    where = jnp.asarray([True, True, False])
    close(
        losses.reward_to_go(jnp.asarray([1.0, 2.0, jnp.nan]), gamma=0.5, where=where),
        [2, 2, 0],
        atol=1e-6,
    )
    close(losses.iw_opd_weight(jnp.asarray([1.0, -1.0, 2.0])), [1.5, 1.375, 1.25], atol=1e-6)
    white = losses.whitened(jnp.asarray([1.0, 3.0, jnp.inf]), where=where)
    close(white, [-(0.5**0.5), 0.5**0.5, 0], atol=1e-6)


def test_drafts_count_where_the_targets_favorite_is_known() -> None:
    target = jnp.asarray([[[3.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 3.0]]])
    where, ids = jnp.ones((1, 3), bool), jnp.asarray([0, 2])
    logits, counted = losses.draft_targets(target, where, step=1, draft_ids=ids)
    np.testing.assert_array_equal(counted, [[False, True, False]])
    np.testing.assert_array_equal(logits[0, :2], target[0, 1:, ids].T)
    np.testing.assert_array_equal(losses.known_to_draft(target, draft_ids=ids)[0, 0], [3, 1])
    alpha = losses.acceptance(jnp.log(P), jnp.log(Q))
    close(alpha, 1 - losses.total_variation(jnp.log(P), jnp.log(Q)), atol=1e-6)
    # What is refused of a draft that nearly agrees, to the float's own accuracy.
    near = jnp.log(P) + jnp.asarray([1e-3, 0, -1e-3])
    q = np.exp(np.asarray(near, np.float64))
    p = np.exp(np.asarray(jnp.log(P), np.float64))
    gaps = np.maximum(q / q.sum() - p / p.sum(), 0)
    refused = losses.lk_lambda(near, jnp.log(P), weight=0.0)
    np.testing.assert_allclose(refused, gaps.sum(), rtol=1e-6)
    part = losses.acceptance(jnp.log(P[:2]), jnp.log(Q), draft_ids=jnp.asarray([0, 1]))
    close(part, 0.2 + 0.3, atol=1e-6)
    own = losses.top_k_targets(jnp.log(Q), k=2)
    assert int(losses.top_k_overlap(jnp.log(P), own)) == 1
    np.testing.assert_array_equal(losses.in_student_top_k(jnp.log(P), own), [False, True])


def of_top_k(loss: Any) -> Any:
    return lambda s, t: loss(s, losses.top_k_targets(t, k=3))


def of_draws(s: jax.Array, t: jax.Array) -> jax.Array:
    drawn = jnp.broadcast_to(jnp.asarray([5, 0, 5, 7]), (*t.shape[:-1], 4))
    return losses.random_sampling_cross_entropy(s, losses.random_sampling_targets(t, drawn))


OF_LOGITS = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "soft_cross_entropy": losses.soft_cross_entropy,
    "jsd_gkd": partial(losses.jsd_gkd, beta=0.3),
    "jsd_normalized": losses.jsd_normalized,
    "skew_forward_kl": losses.skew_forward_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "adaptive": lambda s, t: losses.symmetric_kl(
        s, t, weight=jax.lax.stop_gradient(losses.adaptive_kl_weight(s, t))
    ),
    "total_variation": losses.total_variation,
    "student_top_k_reverse_kl": partial(losses.student_top_k_reverse_kl, k=3),
    "entropy_aware_kl": losses.entropy_aware_kl,
    "entropy_aware_kl_top_k": partial(losses.entropy_aware_kl, k=3),
    "taid": lambda s, t: losses.forward_kl(s, losses.taid_teacher(s, t, progress=0.4)),
    "top_k_kl_tail": of_top_k(losses.top_k_kl_tail),
    "top_k_kl_renormalized": of_top_k(losses.top_k_kl_renormalized),
    "top_k_kl_teacher_renormalized": of_top_k(losses.top_k_kl_teacher_renormalized),
    "top_k_kl_truncated": of_top_k(losses.top_k_kl_truncated),
    "top_k_kl_sampled": of_top_k(losses.top_k_kl_sampled),
    "random_sampling": of_draws,
    "uld": losses.uld,
    "uld_w1": losses.uld_w1,
    "lk_alpha": losses.lk_alpha,
    "lk_lambda": partial(losses.lk_lambda, weight=0.3),
    "acceptance": losses.acceptance,
}


@pytest.mark.usefixtures("x64")
def test_chunks_padding_id_maps_and_sharded_vocabularies_change_nothing() -> None:
    """Every loss at once with a weight of its own, so that each form is one program."""
    rng = np.random.default_rng(0)
    ours, theirs = (jnp.asarray(rng.normal(size=(2, 4, 5))) for _ in range(2))
    kernel, other = (jnp.asarray(rng.normal(size=(5, 8))) for _ in range(2))
    order = jnp.asarray(rng.permutation(8))
    tokens = jnp.asarray(rng.integers(0, 8, (2, 4)))

    def loss(s: jax.Array, t: jax.Array, at: jax.Array) -> jax.Array:
        values = [*(f(s, t) for f in OF_LOGITS.values()), losses.token_log_probs(s, at)]
        return sum((value * (1 + i / 7) for i, value in enumerate(values)), jnp.zeros(at.shape))

    def dense(kernel: jax.Array) -> jax.Array:
        s, t = losses.head_logits(ours, Head(kernel)), losses.head_logits(theirs, Head(other))
        return jnp.sum(loss(s, t, tokens))

    want, by_kernel = jax.jit(jax.value_and_grad(dense))(kernel)
    # Padded columns that say something, and a teacher that numbers the tokens differently.
    padded = jnp.concatenate([kernel, 9 * jnp.ones((5, 4))], axis=1)
    mapped = jnp.zeros((5, 8)).at[:, order].set(other)

    def chunked(kernel: jax.Array) -> jax.Array:
        def of_chunk(s: jax.Array, told: Any) -> jax.Array:
            t = losses.by_id(losses.head_logits(told[0], Head(mapped)), order)
            s = losses.without_padding(s, size=8)
            return loss(s, losses.without_padding(t, size=8, width=12), told[1])

        return losses.chunked_loss(
            of_chunk, ours, Head(kernel), (theirs, tokens), chunk_size=3
        ).total

    # The vocabulary in four parts, each on a device of its own.
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    got, gradient = jax.jit(jax.value_and_grad(chunked))(jax.device_put(padded, parts))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    np.testing.assert_allclose(gradient[:, :8], by_kernel, rtol=1e-7, atol=1e-9)
    assert not np.any(gradient[:, 8:])


def test_one_teacher_per_example_in_chunks_or_dense() -> None:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    teachers, owner = kernels[1:], np.asarray([1, 0, 1])

    @jax.jit
    def of_one(kernel: jax.Array, where: jax.Array) -> Any:
        student = Head(kernels[0])
        return losses.chunked_divergence(
            losses.reverse_kl, hidden, student, hidden, Head(kernel), where=where
        )

    parts = [
        of_one(kernel, np.broadcast_to(owner[:, None] == k, (3, 2)))
        for k, kernel in enumerate(teachers)
    ]
    own = jnp.stack([hidden @ kernel for kernel in teachers])
    one_hot = (owner[None] == np.arange(2)[:, None]).astype(np.float32)
    over = ensembles.over_teachers(losses.reverse_kl, weights=one_hot)
    dense = jax.jit(over)(hidden @ kernels[0], own)
    close(sum(p.total for p in parts), jnp.sum(dense), rtol=1e-5)
    assert sum(p.weight for p in parts) == 6
