"""Language terms and methods: what is counted, what is learned from, two steps of each method."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import language, losses, models, train

CONFIG = models.DecoderConfig(
    vocabulary=12,
    width=8,
    layers=1,
    heads=2,
    key_heads=1,
    head_width=4,
    hidden=12,
    ropes=(models.Rope((1.0, 0.1)),),
    is_tied=True,
)
DECODER = models.decoder(CONFIG)
MODEL = language.model(DECODER)
STUDENT, TEACHER = (
    jax.tree.map(lambda x: 8 * x, DECODER.init(jax.random.key(seed))) for seed in (0, 1)
)
TX, KEY = optax.sgd(0.1), jax.random.key(3)
pytestmark = pytest.mark.usefixtures("standard_promotion")


def batch(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Any]:
    """Rows of two packed texts, padding at the end, some tokens not learned."""
    draw = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[0, -2:] = 0
    learned = draw.random((rows, length)) < 0.7
    tokens = draw.integers(1, 12, (rows, length)).astype(np.int32)
    return {"inputs": {"tokens": tokens, "segments": segments, "learned": learned & (segments > 0)}}


def dense(inputs: dict[str, Any], params: Any) -> jax.Array:
    hidden, _ = DECODER.apply(params, inputs["tokens"], None, inputs["segments"])
    return losses.head_logits(hidden, DECODER.head(params))


def test_a_position_predicts_the_next_token_of_its_own_text():
    targets, where = language.next_tokens(
        {
            "tokens": jnp.asarray([[5, 6, 7, 8, 0]]),
            "segments": jnp.asarray([[1, 1, 2, 2, 0]]),
            "learned": jnp.asarray([[True, True, True, True, True]]),
        }
    )
    assert targets.tolist() == [[6, 7, 8, 0, 0]]
    assert where.tolist() == [[True, False, True, False, False]]


def test_the_terminating_token_is_learned_though_padding_has_its_number():
    tokens, completion = jnp.asarray([[4, 7, 2, 2, 2]]), jnp.asarray([[0, 1, 1, 0, 0]]) > 0
    segments = jnp.asarray([[1, 1, 1, 0, 0]])
    _, where = language.next_tokens({"tokens": tokens, "segments": segments, "learned": completion})
    assert where.tolist() == [[True, True, False, False, False]]


@cache
def by_definition() -> Any:
    """Of one batch: loss, both means, and the loss's gradient."""
    inputs = batch()["inputs"]

    def loss(params: Any) -> Any:
        targets, where = language.next_tokens(jax.tree.map(jnp.asarray, inputs))
        ours, theirs = dense(inputs, params), dense(inputs, TEACHER)
        task = optax.softmax_cross_entropy_with_integer_labels(ours, targets)
        kd = losses.reverse_kl(ours, theirs)
        means = [jnp.sum(jnp.where(where, x, 0)) / jnp.sum(where) for x in (task, kd)]
        return means[0] + 0.5 * means[1], means

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(STUDENT)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_terms_are_means_over_learned_tokens_whatever_the_parts(microbatches: int):
    terms = language.together(
        language.cross_entropy(chunk_size=5), language.divergence(losses.reverse_kl, chunk_size=5)
    )
    step = train.make_step(
        MODEL, terms, {"task": 1.0, "kd": 0.5}, TX, teacher=MODEL, microbatches=microbatches
    )
    given = batch()
    state = train.init_state(STUDENT, TX, key=jax.random.key(0))
    new, metrics = jax.jit(step)(state, given, TEACHER)

    (value, means), gradient = by_definition()
    np.testing.assert_allclose(train.values(metrics)["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(train.values(metrics)["kd"], means[1], rtol=1e-5)
    for a, b, g in zip(*map(jax.tree.leaves, (new.params, STUDENT, gradient)), strict=True):
        np.testing.assert_allclose(a, b - 0.1 * g, atol=2e-6)


def test_rows_of_weight_zero_and_padding_change_nothing():
    step = jax.jit(train.make_step(MODEL, language.cross_entropy(), {"task": 1.0}, TX))
    given = batch()
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), given)
    padded["weights"] = np.asarray([1, 1, 1, 1, 0, 0], np.float32)
    inputs = padded["inputs"]
    inputs["tokens"] = np.where(inputs["segments"] > 0, inputs["tokens"], -100)  # no token's id
    inputs["tokens"][4:], inputs["segments"][5] = 10**6, -1
    state = train.init_state(STUDENT, TX, key=jax.random.key(0))
    one, two = step(state, given)[0], step(state, padded)[0]
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        # Two shapes are two programs, whose sums round apart by a few units of the last place.
        np.testing.assert_allclose(a, b, atol=1e-6)


def prompts(rows: int = 4) -> dict[str, Any]:
    """Prompts of three columns, one of them short, and completions of five."""
    given = batch(rows)["inputs"]
    segments = np.ones((rows, 8), np.int32)
    segments[0, 0] = 0
    context = {"tokens": given["tokens"][:, :5], "segments": np.ones((rows, 5), np.int32)}
    learned = np.arange(8) >= 3
    learned = np.broadcast_to(learned, segments.shape)
    inputs = {"tokens": given["tokens"], "segments": segments, "learned": learned}
    return {"inputs": {**inputs, "privileged": context}}


SETUP = language.Setup(DECODER, TX, prompt=3, stop_tokens=(2,), chunk_size=16)


METHODS = {method.name: method for method in language.methods()}


@cache
def learner(name: str, temperature: float = 1.0) -> language.Learner:
    """A method of SETUP, its step compiled once."""
    built = METHODS[name].build(SETUP._replace(temperature=temperature))
    return built._replace(step=jax.jit(built.step))


def begun() -> Any:
    return train.init_state(STUDENT, TX, key=jax.random.key(0))


def same(one: Any, two: Any, **tolerance: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), one, two)


@pytest.mark.parametrize("method", language.methods(), ids=lambda m: m.name)
def test_every_method_makes_steps_that_repeat(method: language.LanguageMethod):
    step, begin = learner(method.name)
    given = prompts()
    teacher = None if method.name == "self_ema" else TEACHER

    def two_steps() -> Any:
        state, _ = step(begin(begun()), given, teacher)
        return step(state, given, teacher)

    (state, metrics), (again, _) = two_steps(), two_steps()
    assert all(np.isfinite(x) for x in train.values(metrics).values())
    assert metrics["loss"].weight > 0
    changed = False
    for a, b, start in zip(
        *map(jax.tree.leaves, (state.params, again.params, STUDENT)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        changed |= bool(np.any(np.asarray(a) != np.asarray(start)))
    assert changed


@pytest.mark.parametrize("name", ["gkd", "opd", "opd_sampled", "minillm"])
def test_padding_of_the_tables_is_neither_sampled_nor_compared(name: str):
    def padded(params: Any, rows: int) -> Any:
        table = params["tokens"]["embedding"]
        fill = jnp.full((rows - len(table), table.shape[1]), 50.0)  # would be sampled at once
        return {**params, "tokens": {"embedding": jnp.concatenate([table, fill])}}

    setup = SETUP._replace(
        student=models.decoder(CONFIG._replace(vocabulary=16)),
        teacher=models.decoder(CONFIG._replace(vocabulary=13)),
        vocabulary=12,
        share=1.0,
    )
    plain = METHODS[name].build(SETUP._replace(share=1.0)) if name == "gkd" else learner(name)
    expected, _ = jax.jit(plain.step)(begun(), prompts(), TEACHER)
    state = train.init_state(padded(STUDENT, 16), TX, key=jax.random.key(0))
    step = jax.jit(METHODS[name].build(setup).step)
    new, metrics = step(state, prompts(), padded(TEACHER, 13))
    assert all(np.isfinite(x) for x in train.values(metrics).values())
    same(new.params, padded(expected.params, 16), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"vocabulary must lie in 1..12, the rows of a table"):
        METHODS[name].build(SETUP._replace(vocabulary=13))


def test_who_samples_and_who_teaches():
    """At temperature 0 what is sampled is known, and a step is one on data that hold it."""
    given = prompts()
    draw = jax.jit(language.rollout(DECODER, prompt=3, stop_tokens=(2,), temperature=0.0))
    own, teachers = (
        {"inputs": draw(p, given["inputs"], jax.random.key(9))} for p in (STUDENT, TEACHER)
    )
    assert np.any(own["inputs"]["tokens"] != teachers["inputs"]["tokens"])
    close = partial(same, rtol=1e-6, atol=1e-6)

    expected, _ = learner("sft")[0](begun(), teachers, None)
    close(learner("seqkd", 0.0)[0](begun(), given, TEACHER)[0].params, expected.params)

    reverse = language.kd(SETUP._replace(divergence=losses.reverse_kl))
    expected, _ = jax.jit(reverse.step)(begun(), own, TEACHER)
    close(learner("opd", 0.0)[0](begun(), given, TEACHER)[0].params, expected.params)

    terms = language.divergence(losses.reverse_kl, chunk_size=16)
    by_hand = jax.jit(
        train.make_step(MODEL, terms, {"kd": 1.0}, TX, teacher=language.privileged(MODEL, 3))
    )
    own["inputs"]["privileged"] = given["inputs"]["privileged"]
    first, _ = by_hand(begun(), own, STUDENT)
    following, begin = learner("self_ema", 0.0)
    state, _ = following(begin(begun()), given)
    close(state.params, first.params)
    mean = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, STUDENT, first.params)
    later = draw(first.params, given["inputs"], jax.random.key(9))
    second, _ = by_hand(first, {"inputs": {**own["inputs"], **later}}, mean)
    same(following(state, given)[0].params, second.params, atol=3e-6)


def test_a_rollout_keeps_the_prompt_and_learns_what_it_sampled():
    given = prompts()["inputs"]
    draw = language.rollout(DECODER, prompt=3, stop_tokens=(2,))
    actual = jax.jit(draw)(STUDENT, given, jax.random.key(3))
    np.testing.assert_array_equal(actual["tokens"][:, :3], given["tokens"][:, :3])
    np.testing.assert_array_equal(actual["segments"][:, :3], given["segments"][:, :3])
    np.testing.assert_array_equal(actual["learned"], (actual["segments"] > 0) & (np.arange(8) >= 3))
    # The sampler's log-probabilities are the model's own at temperature 1.
    inputs = jax.tree.map(np.asarray, dict(actual))
    logits = dense(inputs, STUDENT)
    own = losses.token_log_probs(logits[:, :-1], actual["tokens"][:, 1:])
    where = np.asarray(actual["learned"])[:, 1:]
    # Logits reach 12, with digits of 1e-6, and a cache multiplies in another order.
    np.testing.assert_allclose(
        np.where(where, own, 0), np.where(where, actual["log_probs"][:, 1:], 0), atol=1e-5
    )


def test_a_row_of_padding_alone_is_not_learned():
    given = prompts()["inputs"]
    padded = given["segments"].copy()
    padded[1] = 0
    drawn = jax.jit(language.rollout(DECODER, prompt=3))(
        STUDENT, {**given, "segments": padded}, KEY
    )
    assert not np.any(drawn["learned"][1]) and np.all(drawn["learned"][0, 3:])
    assert not np.any(drawn["segments"][1]) and not np.any(drawn["log_probs"][1])
    # A first column of padding stays one.
    assert drawn["segments"][0].tolist() == [0] + [1] * 7


def test_the_last_text_of_a_prompt_is_continued_as_if_it_stood_alone():
    given, draw = prompts()["inputs"], jax.jit(language.rollout(DECODER, prompt=3))
    context = given["privileged"]["tokens"]
    several, one = (np.broadcast_to(row, (4, 8)) for row in ([1, 2, 2] + [2] * 5, [0] + [1] * 7))
    actual, alone = (
        draw(
            STUDENT,
            {**given, "segments": s, "privileged": {"tokens": context, "segments": own}},
            KEY,
        )
        for s, own in ((several, several[:, [0, 0, 1, 1, 1]]), (one, one[:, [0, 0, 1, 1, 1]]))
    )
    same(actual, alone)
    assert actual["privileged"]["segments"].tolist() == [[0, 0, 1, 1, 1]] * 4


def test_gkd_learns_from_the_data_in_the_other_steps():
    """With the cross-entropy beside it, which is with the data alone."""
    setup, given = SETUP._replace(task=1.0), prompts()
    _, where = language.next_tokens(given["inputs"])
    kd = language.kd(setup._replace(divergence=partial(losses.jsd_gkd, beta=0.5)))
    expected, _ = jax.jit(kd.step)(begun(), given, TEACHER)
    data, sampled = (
        jax.jit(language.gkd(setup._replace(share=share)).step)(begun(), given, TEACHER)
        for share in (0.0, 1.0)
    )
    same(data[0].params, expected.params, atol=1e-7)
    assert data[1]["task"].weight == np.sum(where) and sampled[1]["task"].weight == 0
    assert sampled[1]["kd"].weight > 0 and np.isfinite(train.values(sampled[1])["loss"])
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        language.gkd(SETUP._replace(share=1.5))


def test_a_privileged_teacher_sees_its_own_prompt_and_the_same_completion():
    given = jax.tree.map(jnp.asarray, prompts()["inputs"])
    outputs, _ = jax.jit(language.privileged(MODEL, 3))(TEACHER, None, given)
    alone = {
        "tokens": jnp.concatenate([given["privileged"]["tokens"], given["tokens"][:, 3:]], axis=1),
        "segments": jnp.ones((4, 10), jnp.int32),
    }
    hidden = jax.jit(MODEL)(TEACHER, None, alone)[0]["hidden"]
    np.testing.assert_allclose(outputs["hidden"][:, 2:], hidden[:, 4:], atol=1e-6)


def test_a_student_learns_from_the_layers_of_its_teacher():
    """Hidden states of chosen layers are outputs; a term on them counts the real positions."""
    model = language.model(DECODER, taps=[r"layers_\d", "tokens"])

    def terms(inputs: Any) -> Any:
        where = inputs.batch["inputs"]["segments"] > 0
        loss = losses.mse(inputs.student["layers_0"], inputs.teacher["layers_0"], where=where)
        return {"hidden": loss}

    step = jax.jit(train.make_step(model, terms, {"hidden": 1.0}, TX, teacher=model))
    given = batch()
    new, metrics = step(begun(), given, TEACHER)
    tap = jax.jit(partial(DECODER.tap, ["layers_0"]))
    inputs = given["inputs"]
    ours, theirs = (
        tap(params, inputs["tokens"], None, inputs["segments"])[1]["layers_0"]
        for params in (STUDENT, TEACHER)
    )
    gap = np.square(np.asarray(ours, np.float64) - theirs).mean(-1)
    real = inputs["segments"] > 0
    expected = np.mean(np.where(real, gap, 0).sum(1) / real.sum(1))
    np.testing.assert_allclose(train.values(metrics)["hidden"], expected, rtol=1e-6)
    assert np.any(jax.tree.leaves(new.params)[0] != jax.tree.leaves(STUDENT)[0])
    outputs, _ = jax.eval_shape(model, STUDENT, None, inputs)
    assert sorted(outputs) == ["head", "hidden", "layers_0", "tokens"]
    with pytest.raises(ValueError, match="layers_7"):
        language.model(DECODER, taps=["layers_7"])


def test_returns_are_means_of_later_rewards():
    # The gradient of the long part by hand: -sum_t sg(R_t) grad log p(y_t) / count.
    given = jax.tree.map(jnp.asarray, prompts()["inputs"])
    drawn = jax.jit(language.rollout(DECODER, prompt=3))(STUDENT, given, jax.random.key(0))
    targets, where = language.next_tokens(drawn)

    @jax.jit
    def log_p(params: Any) -> Any:
        return losses.token_log_probs(dense(drawn, params), targets, where=where)

    gap = np.asarray(log_p(TEACHER) - log_p(STUDENT), np.float64)
    returns = np.zeros_like(gap)
    for row in range(4):
        places = np.flatnonzero(where[row])
        for i, place in enumerate(places[:-1]):
            returns[row, place] = gap[row, places[i + 1 :]].mean()
    weight = jnp.asarray(returns / np.sum(where), jnp.float32)
    expected = jax.jit(jax.grad(lambda p: -jnp.sum(weight * log_p(p))))(STUDENT)
    step = train.make_step(
        MODEL, language.policy_gradient(chunk_size=7), {"long": 1.0}, TX, teacher=MODEL
    )
    state = train.init_state(STUDENT, TX, key=jax.random.key(0))
    new = jax.jit(step)(state, {"inputs": drawn}, TEACHER)[0]
    for a, b, g in zip(*map(jax.tree.leaves, (new.params, STUDENT, expected)), strict=True):
        np.testing.assert_allclose(a, b - 0.1 * g, atol=1e-5)  # of logits up to 12
