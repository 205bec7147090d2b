"""Rows of weight 0 change nothing of a method: no value, no gradient, no memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_pairs import BATCH, KEYS, QUICKLY, Pair, cnns, mlps

from kdtl_jax import methods, objective
from kdtl_jax.methods import Entry, Method
from kdtl_jax.objective import Inputs

PADDING = 3
NAMED = {entry.name: entry for entry in methods.table()}
# Methods in which an example's value depends on others: relations, statistics of the batch, banks.
BETWEEN = """
dist mlld hint ridge_hint ickd pkd srd review ft ab ofd simkd srrl sp rkd pkt cc itrd info_nce
dcd rrd uskd
""".split()
# Those that draw at random: other rows alone draw other numbers.
DRAWN = ["crd", "mgd", "jacobian"]
ON_MAPS = ["wkd_f", "cwd", "catkd"]


def outcome(pair: Pair, method: Method, connectors: Any, memory: Any, batch: dict[str, Any]) -> Any:
    """Weighted means of the terms, the gradient of their sum, the memory that follows."""

    def loss(trained: Any) -> tuple[Array, Any]:
        params, glue = trained
        student = pair.model(params, batch["inputs"])
        key = jax.random.key(5, impl=KEYS)
        result = method.terms(
            Inputs(
                student,
                batch["teacher"],
                batch,
                params,
                glue,
                memory=memory,
                step=jnp.int32(0),
                key=key,
            )
        )
        named, after = result if isinstance(result, tuple) else (result, memory)
        means = objective.reduce_all(named, batch.get("weights"))
        values = {name: mean.value() for name, mean in means.items()}
        return sum(values.values(), jnp.float32(0)), (values, after)

    grads, (values, after) = jax.grad(loss, has_aux=True)((pair.student, connectors))
    return values, grads, after


def padded(pair: Pair, seed: int) -> dict[str, Any]:
    """The batch and rows of weight 0 that hold anything: labels out of range, others' places."""
    rng = np.random.default_rng(seed)

    def pad(x: Array) -> Array:
        rows = rng.normal(scale=100.0, size=(PADDING, *x.shape[1:]))
        return jnp.concatenate([x, jnp.asarray(rows, x.dtype)])

    rows = {
        "inputs": pad(pair.batch["inputs"]),
        "teacher": {name: pad(x) for name, x in pair.teacher.items()},
        "weights": jnp.arange(BATCH + PADDING) < BATCH,
        "labels": jnp.append(pair.batch["labels"], jnp.array([-100, 255, seed], jnp.int32)),
        "index": jnp.append(pair.batch["index"], jnp.array([3, 4, seed], jnp.int32)),
    }
    return {**rows, "weights": rows["weights"].astype(jnp.float32)}


def outcomes(pair: Pair, entry: Entry, *batches: dict[str, Any]) -> list[Any]:
    method = entry.build(pair.setup._replace(task=lambda inputs: {}))
    keys = (jax.random.key(seed, impl=KEYS) for seed in (3, 4))
    init = jax.jit(lambda a, b: (method.connectors(a), method.memory(b)), **QUICKLY)
    run = jax.jit(lambda *given: outcome(pair, method, *given), **QUICKLY)
    connectors, memory = init(*keys)
    return [run(connectors, memory, batch) for batch in batches]


def equal(found: Any, wanted: Any, *, atol: float = 2e-5) -> None:
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol), found, wanted)


@pytest.mark.parametrize("name", BETWEEN)
def test_padding_gives_the_numbers_of_the_real_rows(name: str) -> None:
    pair = mlps()
    real = {**pair.batch, "teacher": dict(pair.teacher)}
    [expected] = outcomes(pair, NAMED[name], real)
    [result] = outcomes(pair, NAMED[name], padded(pair, 0))
    equal(result, expected, atol=2e-5 * max(1, max(abs(float(v)) for v in expected[0].values())))


@pytest.mark.parametrize("name", DRAWN)
def test_what_padding_holds_does_not_matter(name: str) -> None:
    pair = mlps()
    one, other = outcomes(pair, NAMED[name], padded(pair, 1), padded(pair, 2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ON_MAPS)
def test_padding_of_maps_gives_the_numbers_of_the_real_rows(name: str) -> None:
    pair = cnns()
    real = {**pair.batch, "teacher": dict(pair.teacher)}
    [expected] = outcomes(pair, NAMED[name], real)
    [result] = outcomes(pair, NAMED[name], padded(pair, 0))
    equal(result, expected)


def test_simkd_predicts_each_example_by_itself() -> None:
    """Inference normalizes by running statistics: who else is in the batch does not matter."""
    pair = cnns()
    method = methods.simkd(pair.setup)
    assert method.predict is not None
    connectors = method.connectors(jax.random.key(0))
    memory = method.memory(jax.random.key(1))
    student = pair.model(pair.student, pair.batch["inputs"])
    inputs = Inputs(student, pair.teacher, pair.batch, pair.student, connectors, memory=memory)
    _, memory = method.terms(inputs)
    together = method.predict(connectors, memory, student)
    alone = [
        method.predict(connectors, memory, {name: x[i : i + 1] for name, x in student.items()})
        for i in range(BATCH)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert not np.allclose(together, student["logits"])
