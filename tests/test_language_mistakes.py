"""More of what users of language-model trainers ran into: precision, schedules, modes, padding."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import language, losses, models, train, transforms
from kdtl_jax.losses import Head
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _language_steps

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_half_precision_heads_do_not_round_the_logits() -> None:
    """Products that come out in bfloat16 put gradients off by 2 %, of large models by 4 to 23."""
    rng = np.random.default_rng(0)
    shapes = {"s": (32, 64), "t": (32, 64), "w_s": (64, 500), "w_t": (64, 500)}
    x = {name: jnp.asarray(rng.normal(size=size), jnp.bfloat16) for name, size in shapes.items()}
    x |= {"t": x["s"] + 0.25 * x["t"], "w_t": x["w_s"]}  # students are near their teachers

    def ours(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return losses.chunked_divergence(
            losses.forward_kl, hidden, Head(kernel), x["t"], Head(x["w_t"]), chunk_size=16
        ).total

    def rounded(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        pairs = (hidden, kernel), (x["t"], x["w_t"])
        logits = (losses.head_logits(h, Head(w)) for h, w in pairs)
        return jnp.sum(losses.forward_kl(*(jax.lax.reduce_precision(z, 8, 7) for z in logits)))

    by = jax.jit(lambda f, *at: jax.grad(f, (0, 1))(*at), static_argnums=0)
    s, t, w_s, w_t = (np.asarray(x[name], np.float64) for name in shapes)
    odds = (np.exp(z - z.max(-1, keepdims=True)) for z in (s @ w_s, t @ w_t))
    q, p = (x / x.sum(-1, keepdims=True) for x in odds)
    apart = q - p
    for actual, exact in zip(by(ours, x["s"], x["w_s"]), (apart @ w_s.T, s.T @ apart), strict=True):
        assert np.linalg.norm(np.asarray(actual, np.float64) - exact) < 0.004 * np.linalg.norm(
            exact
        )
    wrong = np.asarray(by(rounded, x["s"], x["w_s"])[0], np.float64)
    assert np.linalg.norm(wrong - apart @ w_s.T) > 0.02 * np.linalg.norm(apart @ w_s.T)
    # A logit of 80.25 is 80 in bfloat16: the most likely token loses 1 - exp(-1/4) of its odds.
    one, two = (
        jnp.asarray([[1.0, 0.25]], jnp.bfloat16),
        jnp.asarray([[80, 80], [1, 0]], jnp.bfloat16),
    )
    np.testing.assert_array_equal(losses.head_logits(one, Head(two)), [[80.25, 80]])
    np.testing.assert_array_equal(one @ two, [[80, 80]])


def test_the_rate_follows_the_runs_own_length() -> None:
    """A schedule of 150,001 steps leaves a run of 40 at 1/300 of its rate."""
    run: Any = SimpleNamespace(settings=SimpleNamespace(learning_rate=0.1))
    tx = _language_steps._optimizer(run, 40)

    def step(state: Any, _: Any) -> Any:  # at weights of 0, Adam's step is the rate itself
        updates: Any
        updates, state = tx.update({"w": jnp.ones(1)}, state, {"w": jnp.zeros(1)})
        return state, -updates["w"][0]

    rates = np.asarray(jax.lax.scan(step, tx.init({"w": jnp.zeros(1)}), None, 40)[1])
    assert rates[0] == 0 and rates[2] == pytest.approx(0.1, rel=1e-4) == rates.max()
    assert (np.diff(rates[2:]) < 0).all() and rates[-1] < 1e-3


def test_a_teacher_on_a_shared_base_does_not_turn_off_the_students_dropout() -> None:
    base = {"w": {"kernel": jnp.ones((64, 1))}}
    adapter = transforms.lora(rank=2, alpha=2.0)
    seen: list[bool] = []

    def network(params: Any, inputs: jax.Array, key: Any, train: bool) -> jax.Array:
        seen.append(train)
        if train:
            inputs = 2 * inputs * jax.random.bernoulli(key, 0.5, inputs.shape)
        return inputs @ params["w"]["kernel"]

    def student(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ):
        whole = adapter.apply(params.base, params.adapter)
        return {"y": network(whole, inputs, key, train)}, model_state

    def teacher(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ):
        return {"y": network(params, inputs, key, train)}, model_state

    def terms(inputs: Any) -> dict[str, Any]:
        return {"student": inputs.student["y"][:, 0], "teacher": inputs.teacher["y"][:, 0]}

    params, tx = adapter.init(jax.random.key(0), base, where=".*"), optax.sgd(0.0)
    weights = {"student": 1.0, "teacher": 1.0}
    own = r"adapter/.*"
    step = jax.jit(train.make_step(student, terms, weights, tx, teacher=teacher, trainable=own))
    actual = []
    for seed in range(2):
        state = train.init_state(params, tx, key=jax.random.key(seed), trainable=own)
        metrics = step(state, {"inputs": jnp.ones((1, 64))}, base)[1]
        actual.append({name: float(metrics[name].value()) for name in weights})
    assert actual[0]["teacher"] == actual[1]["teacher"] == 64
    assert actual[0]["student"] != actual[1]["student"] and 64 not in (x["student"] for x in actual)
    assert set(seen) == {True, False}


def test_padding_invents_no_gap_between_methods() -> None:
    """Two students that differ on padding alone: once 21.3 and 24.0 of one text."""
    key = jax.random.key(0)
    head = Head(3 * jax.random.normal(key, (8, 11)))
    hidden, other = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 6, 8))
    tokens = jax.random.randint(jax.random.fold_in(key, 2), (2, 6), 0, 11)
    segments = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    real = (segments > 0)[..., None]
    first, second = ({"hidden": jnp.where(real, hidden, x), "head": head} for x in (hidden, other))

    def measured(batch: dict[str, jax.Array]) -> np.ndarray:
        rows = language.next_tokens(batch)
        nats = [language.fidelity(x, first, *rows).nats.value() for x in (first, second)]
        return np.exp(np.asarray(nats))

    one, two = measured({"tokens": tokens, "segments": segments})
    assert one == two
    one, two = measured({"tokens": tokens})  # whoever forgets the mask
    assert abs(one / two - 1) > 0.1


def probabilities(z: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of logits in float64."""
    odds = (np.exp(np.asarray(x, np.float64)) for x in (z, y))
    first, second = (x / x.sum(-1, keepdims=True) for x in odds)
    return first, second


def test_no_cross_entropy_and_no_sampling_temperature_enters_a_divergence() -> None:
    """A fused path once added half a cross-entropy and the temperature that samples: .342, not
    .297; a student equal to its teacher had a loss."""
    config = models.DecoderConfig(
        vocabulary=7, width=8, layers=1, heads=2, key_heads=1, head_width=4, hidden=8, is_tied=True
    )
    decoder = models.decoder(config)
    begin = jax.jit(lambda key: jax.tree.map(lambda x: 8 * x, decoder.init(key)))
    student, teacher = (begin(jax.random.key(seed)) for seed in (0, 1))
    tokens = jnp.asarray([[1, 4, 2, 6, 3, 5]])
    setup = language.Setup(decoder, optax.sgd(1.0), prompt=2, share=0.0, temperature=0.9)
    step = jax.jit(language.gkd(setup).step)
    inputs = {"tokens": tokens, "segments": jnp.ones_like(tokens), "learned": tokens > 0}

    def run(against: Any) -> tuple[float, Any]:
        state = train.init_state(student, setup.tx, key=jax.random.key(2))
        state, metrics = step(state, {"inputs": inputs}, against)
        return float(metrics["loss"].value()), state.params

    @jax.jit
    def logits(params: Any) -> jax.Array:
        return losses.head_logits(decoder.apply(params, tokens)[0], decoder.head(params))[:, :-1]

    p, q = probabilities(logits(student), logits(teacher))
    middle = (p + q) / 2
    exact = np.mean(np.sum(p * np.log(p / middle) + q * np.log(q / middle), -1) / 2)
    actual, _ = run(teacher)
    assert actual == pytest.approx(exact, rel=1e-5) and exact > 0.1
    nothing, unchanged = run(student)
    assert nothing == pytest.approx(0, abs=1e-7)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), unchanged, student
    )


@pytest.mark.parametrize("answer", [3, 5])
def test_an_answer_of_one_token_is_learned_where_it_is_predicted(answer: int) -> None:
    """A mask one position off has nothing to learn, or the token after: a gradient of 0, not .114,
    at the last position of the prompt."""
    tokens = jnp.asarray([[1, 4, 2, 6, 3, 5]])
    learned = jnp.arange(6)[None] == answer
    rng = np.random.default_rng(0)
    hidden, other = jnp.asarray(rng.normal(size=(2, 1, 6, 7)), jnp.float32)
    outputs = [{"hidden": x, "head": Head(jnp.eye(7))} for x in (hidden, other)]  # are the logits

    def total(term: Any, hidden: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, Any]:
        batch = {"inputs": {"tokens": tokens, "learned": learned, "log_probs": log_probs}}
        given = Inputs(student=outputs[0] | {"hidden": hidden}, teacher=outputs[1], batch=batch)
        (mean,) = term(given).values()
        return mean.value(), mean.weight

    p, q = probabilities(hidden[0, answer - 1], other[0, answer - 1])
    token = int(tokens[0, answer])
    onehot = np.eye(7)[token]
    apart = np.log(p) - np.log(q)
    sampler = jnp.zeros((1, 6)).at[0, answer].set(float(np.log(p[token])))
    expected = {
        language.cross_entropy(): p - onehot,
        language.divergence(losses.forward_kl): p - q,
        language.divergence(losses.reverse_kl): p * (apart - np.sum(p * apart)),
        language.sampled_reverse_kl(): apart[token] * (onehot - p),
    }
    slope = jax.jit(jax.grad(total, 1, has_aux=True), static_argnums=0)
    for term, exact in expected.items():
        result, weight = slope(term, hidden, sampler)
        gradient = np.array(result)
        assert weight == 1
        np.testing.assert_allclose(gradient[0, answer - 1], exact, rtol=1e-4, atol=1e-6)
        assert np.abs(exact).max() > 0.1
        gradient[0, answer - 1] = 0
        assert not gradient.any()
