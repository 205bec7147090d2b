"""Who teaches whom: recipes against their equations written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses
from kdtl_jax.train import ensembles, online

pytestmark = pytest.mark.usefixtures("standard_promotion")

K, B, C = 3, 4, 5


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


LABELS = jnp.asarray([0, 4, 2, 2], jnp.int32)


def kl(p_logits: Any, q_logits: Any, temperature: float) -> np.ndarray:
    """`T^2 KL(p || q)` in float64."""
    p, q = (np.asarray(z, np.float64) / temperature for z in (p_logits, q_logits))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def cross_entropy(logits: Any) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -log_p[np.arange(B), np.asarray(LABELS)]


def linear(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return {"logits": inputs @ params["w"]}, model_state


def test_mutual_learning_by_its_equation() -> None:
    logits = normal(K, B, C)
    terms = jax.jit(lambda z: online.mutual_terms(z, LABELS, temperature=2.0))(logits)
    mutual = sum(
        kl(logits[other], logits[k], 2.0) / (K - 1)
        for k in range(K)
        for other in range(K)
        if other != k
    )
    np.testing.assert_allclose(terms["mutual"], mutual, rtol=1e-4)
    np.testing.assert_allclose(terms["task"], sum(map(cross_entropy, logits)), rtol=1e-5)


def test_a_mutual_teacher_gets_no_gradient() -> None:
    """Each peer's gradient is that of its own two terms, as if the others were constants."""
    logits = normal(2, B, C)

    def total(z: jax.Array) -> jax.Array:
        return jnp.sum(online.mutual_terms(z, LABELS)["mutual"])

    slope = jax.jit(jax.grad(total))(logits)
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(slope[0], p[0] - p[1], atol=1e-5)
    np.testing.assert_allclose(slope[1], p[1] - p[0], atol=1e-5)


def test_one_by_its_equation() -> None:
    branches, scores = normal(K, B, C), normal(B, K, seed=1)
    run = jax.jit(lambda z, g: online.one_terms(z, g, LABELS))
    terms = run(branches, scores)
    gates = np.exp(np.asarray(scores, np.float64))
    gates /= gates.sum(-1, keepdims=True)
    ensemble = np.einsum("bk,kbc->bc", gates, np.asarray(branches, np.float64))
    np.testing.assert_allclose(terms["ensemble"], cross_entropy(ensemble), rtol=1e-4)
    np.testing.assert_allclose(
        terms["distill"], sum(kl(ensemble, z, 3.0) for z in branches), rtol=1e-4
    )
    slope = jax.jit(jax.grad(lambda g: jnp.sum(run(branches, g)["distill"])))(scores)
    assert not slope.any()  # the gate learns from the ensemble's own cross-entropy


def test_being_your_own_teacher_by_its_equation() -> None:
    exits = list(normal(K, B, C))
    features = [normal(B, 2, 3, seed=i) for i in range(K)]

    @jax.jit
    def run(exits: Any, features: Any) -> Any:
        return online.self_teaching_terms(exits, LABELS, features=features)

    terms = run(exits, features)
    np.testing.assert_allclose(terms["task"], sum(map(cross_entropy, exits)), rtol=1e-5)
    np.testing.assert_allclose(
        terms["distill"], sum(kl(exits[-1], z, 3.0) for z in exits[:-1]), rtol=1e-4
    )
    hint = sum(((f - features[-1]) ** 2).sum((1, 2)) for f in features[:-1])
    np.testing.assert_allclose(terms["hint"], np.asarray(hint), rtol=1e-5)

    def soft(exits: Any, features: Any) -> jax.Array:
        terms = run(exits, features)
        return jnp.sum(terms["distill"] + terms["hint"])

    slopes = jax.jit(jax.grad(soft, argnums=(0, 1)))(exits, features)
    for of_each in slopes:
        assert of_each[0].any() and not of_each[-1].any()  # the deepest teaches only
    without = jax.eval_shape(lambda z: online.self_teaching_terms(z, LABELS), exits)
    assert "hint" not in without


def test_a_chain_passes_each_network_on() -> None:
    def trainer(size: int) -> online.Trainer:
        return lambda teacher, key: {
            "size": size,
            "taught_by": None if teacher is None else teacher["size"],
            "seed": int(jax.random.randint(key, (), 0, 10**6)),
        }

    chain = online.teacher_chain([trainer(n) for n in (10, 6, 4)], jax.random.key(0))
    assert [net["taught_by"] for net in chain] == [None, 10, 6]
    assert len({net["seed"] for net in chain}) == 3
    taught = online.teacher_chain([trainer(2)], jax.random.key(0), teacher={"size": 99})
    assert taught[0]["taught_by"] == 99
    with pytest.raises(ValueError, match="at least one trainer"):
        online.teacher_chain([], jax.random.key(0))


def test_generations_train_and_ensemble() -> None:
    """A teacher of noise-free labels, reborn: a generation is near its parent."""
    inputs = normal(B, 6)

    @jax.jit
    def fit(w: jax.Array, target: jax.Array) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            return jnp.mean(losses.mse(inputs @ w, target))

        return jax.lax.fori_loop(0, 200, lambda _, w: w - 0.5 * jax.grad(loss)(w), w)

    def trainer(teacher: Any, key: jax.Array) -> Any:
        target = 5 * jax.nn.one_hot(LABELS, C) if teacher is None else inputs @ teacher["w"]
        return {"w": fit(0.1 * jax.random.normal(key, (6, C)), target)}

    generations = online.born_again(trainer, jax.random.key(0), generations=2)
    assert len(generations) == 3
    outputs, _ = ensembles.vmap_teacher(linear)(ensembles.stack_teachers(generations), None, inputs)
    assert (jnp.argmax(ensembles.mean_logits(outputs["logits"]), -1) == LABELS).all()
    np.testing.assert_allclose(outputs["logits"][2], outputs["logits"][1], atol=0.2)


def test_malformed_input_raises() -> None:
    with pytest.raises(ValueError, match=r"at least two peers, got logits\[1, 4, 5\]"):
        online.mutual_terms(normal(1, B, C), LABELS)
    with pytest.raises(ValueError, match=r"labels must have shape \[4\]"):
        online.mutual_terms(normal(K, B, C), LABELS[:3])
    with pytest.raises(ValueError, match="got 1 exits and 0 features"):
        online.self_teaching_terms([normal(B, C)], LABELS)
    with pytest.raises(ValueError, match="got 2 exits and 1 features"):
        online.self_teaching_terms(list(normal(2, B, C)), LABELS, features=[normal(B, 2)])
    with pytest.raises(ValueError, match=r"feature\[4, 2\], deepest\[4, 3\]"):
        features = [normal(B, 2), normal(B, 3)]
        online.self_teaching_terms(list(normal(2, B, C)), LABELS, features=features)


def test_padded_labels_may_be_anything_without_jit_too() -> None:
    """Rows that do not count enter no term: with their labels out of range, values are theirs."""
    where, odd = jnp.arange(B) < 2, jnp.asarray([0, 4, -100, 255], jnp.int32)
    logits, scores = normal(K, B, C), normal(B, K, seed=1)
    for terms in (
        lambda y, where: online.mutual_terms(logits, y, where=where),
        lambda y, where: online.one_terms(logits, scores, y, where=where),
        lambda y, where: online.self_teaching_terms(list(logits), y, where=where),
    ):
        actual, expected = terms(odd, where), terms(LABELS, None)
        for name, values in expected.items():
            np.testing.assert_array_equal(actual[name][:2], values[:2])
        with pytest.raises(ValueError, match="labels must lie in"):
            terms(odd, None)
    with pytest.raises(ValueError, match="softmax over one class"):
        online.mutual_terms(logits[..., :1], 0 * LABELS)
