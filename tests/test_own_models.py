"""Models of one's own, in every framework, as networks: they start, run, and go through a file."""

from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdtl_jax._types import Variables
from kdtl_jax.interop import equinox as from_equinox
from kdtl_jax.interop import model_files, own
from kdtl_jax.interop.model_files import About

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


class Linen(nn.Module):
    num_classes: int = 10  # a default is not a choice: the data's number is filled in
    width: int = 4

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(jax.nn.relu(x))


class NNX(nnx.Module):
    def __init__(self, din: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(din, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        hidden = jax.nn.relu(self.hidden(x))
        return {"hidden": hidden, "logits": self.out(self.dropout(hidden))}


class Equinox(eqx.Module):
    layers: eqx.nn.MLP

    def __init__(self, in_size: int, classes: int, *, key: Any) -> None:
        self.layers = eqx.nn.MLP(in_size, classes, 4, 1, key=key)

    def __call__(self, x: Any) -> Any:
        return self.layers(x)


@pytest.mark.parametrize(
    "init",
    [
        lambda key, x, classes: jnp.ones((x.shape[-1], classes)),
        lambda key, num_classes, x: jnp.ones((x.shape[-1], num_classes)),
        lambda key, *, din, classes=10: jnp.ones((din, classes)),
    ],
)
def test_arguments_of_init_are_filled_in_by_their_names(init: Any) -> None:
    net = own.network((init, lambda params, x: x @ params), classes=3, example=X[:1])
    assert net.init(jax.random.key(0), X[:1]).params.shape == (5, 3)


def test_the_state_that_equinox_keeps_apart_goes_through_a_file(tmp_path: Path) -> None:
    model = from_equinox.model(*with_statistics(3, jax.random.key(0)))
    _, state = model.apply(model.params, model.model_state, X, train=True)
    outputs, _ = model.apply(model.params, state, X)
    about, path = About("my.py:Net", 3, shape=(5,)), tmp_path / "own.safetensors"
    model_files.save(path, Variables(model.params, state), about, {"method": "kd"})
    actual = model_files.load(path, model=with_statistics).predict(X)
    np.testing.assert_allclose(actual, outputs["logits"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must say the model and its classes, got model=None"):
        model_files.save(path, Variables(model.params, state), About(), {})


class Pair:
    @staticmethod
    def init(key: Any, inputs: Any) -> Any:
        return {"w": jax.random.normal(key, (inputs.shape[-1], 3))}

    @staticmethod
    def apply(params: Any, inputs: Any) -> Any:
        return inputs @ params["w"]


class Statistics(eqx.Module):
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, in_features: int, classes: int, *, key: Any) -> None:
        self.norm = eqx.nn.BatchNorm(in_features, "batch", mode="batch")
        self.out = eqx.nn.Linear(in_features, classes, key=key)

    def __call__(self, x: Any, state: Any) -> Any:
        normalized, state = self.norm(x, state)
        return self.out(normalized), state


def with_statistics(classes: int, key: Any) -> Any:
    def build(key: Any) -> Any:
        first, second = jax.random.split(key)
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(5, 4, key=first),
                eqx.nn.BatchNorm(4, "batch", mode="batch"),
                eqx.nn.Linear(4, classes, key=second),
            ]
        )

    return eqx.nn.make_with_state(build)(key)


FORMS = {
    "linen class": Linen,
    "linen instance": Linen(3),
    "linen factory": lambda: Linen(3, 8),
    "factory of one argument": lambda k: Linen(k, 8),
    "nnx class": NNX,
    "equinox class": Equinox,
    "equinox with state": with_statistics,
    "equinox class with state": Statistics,
    "functions": Pair(),
    "two functions": (lambda key: jnp.zeros((5, 3)), lambda params, x: x @ params),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_runs_and_goes_through_a_file(form: str, tmp_path: Path) -> None:
    net = own.network(FORMS[form], classes=3, example=X[:1])
    start = jax.jit(jax.vmap(lambda key: net.init(key, X[:1])))
    several = start(jax.random.split(jax.random.key(0), 2))
    first, second = (jax.tree.map(lambda x, i=i: x[i], several) for i in range(2))
    if form != "two functions":  # seeds start apart
        leaves = zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True)
        assert any((a != b).any() for a, b in leaves)
    outputs, state = net.apply(first.params, first.model_state, X)
    assert outputs["logits"].shape == (6, 3)
    assert jax.tree.structure(state) == jax.tree.structure(first.model_state)
    trained = net.apply(first.params, first.model_state, X, key=jax.random.key(1), train=True)[1]
    assert jax.tree.structure(trained) == jax.tree.structure(first.model_state)
    if net.layout.features:
        assert net.layout.features == ("hidden",)
    path = tmp_path / "own.safetensors"
    model_files.save(path, Variables(*first), About("my.py:Net", 3, None, (), (5,)), {})
    with pytest.raises(ValueError, match=r"belongs to my.py:Net, a model of your own"):
        model_files.load(path)
    actual = model_files.load(path, model=FORMS[form]).predict(X)
    np.testing.assert_allclose(actual, outputs["logits"], rtol=1e-5, atol=1e-6)


def haiku_with_a_mode(x: Any, is_training: bool = False) -> Any:
    return hk.Linear(3)(x) * (2.0 if is_training else 1.0)


def in_either_mode(params: Any, x: Any, key: Any = None, deterministic: bool = True) -> Any:
    assert (key is None) == deterministic
    return x @ params * (1.0 if deterministic else 2.0)


@pytest.mark.parametrize(
    "pair",
    [
        hk.transform(haiku_with_a_mode),
        (Pair.init, lambda params, x, **kwargs: x @ params["w"] * (1.0 + kwargs["training"])),
        (lambda key: jnp.ones((5, 3)), in_either_mode),
    ],
    ids=["haiku", "keywords", "named"],
)
def test_a_pair_of_functions_is_told_its_mode(pair: Any) -> None:
    net = own.network(pair, classes=3, example=X[:1])
    start = net.init(jax.random.key(0), X[:1])
    trained, evaluated = (
        net.apply(*start, X, key=jax.random.key(1) if train else None, train=train)[0]["logits"]
        for train in (True, False)
    )
    np.testing.assert_allclose(trained, 2 * evaluated)


class Needy(nn.Module):
    depth: int
    classes: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(self.classes)(x)


class Nested(nn.Module):
    last: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return {"logits": nn.Dense(3)(x), "features": {"first": (x, 2 * x), "last": self.last}}


class Pairs(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(x), x


class OfBatches(eqx.Module):
    """It maps over the batch itself, with dropout in training."""

    out: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, classes: int, key: Any) -> None:
        self.out, self.dropout = eqx.nn.Linear(5, classes, key=key), eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, key: Any = None) -> Any:
        hidden = self.dropout(x, key=key)
        return jax.vmap(self.out)(hidden), {"hidden": hidden}


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (Nested(), ["features/first/0", "features/first/1"]),
        (Pairs, ["features"]),
        (OfBatches, ["features/hidden"]),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: [x @ p, x, 2 * x]),
            ["features/0", "features/1"],
        ),
        ((lambda key: jnp.ones((5, 3)), lambda p, x: (x @ p, None)), []),
    ],
    ids=["nested", "nnx", "equinox", "functions", "none"],
)
def test_outputs_beside_the_logits_have_names(found: Any, names: list[str]) -> None:
    """Tuples of logits and features, and outputs within outputs."""
    net = own.network(found, classes=3, example=X[:1])
    variables = net.init(jax.random.key(0), X[:1])
    outputs, _ = net.apply(*variables, X)
    assert list(outputs) == ["logits", *names] and outputs["logits"].shape == (6, 3)
    for name, factor in zip(names, (1, 2), strict=False):
        np.testing.assert_array_equal(outputs[name], factor * X)
    assert [*net.layout.features] == names


def test_an_equinox_module_that_maps_over_the_batch_itself() -> None:
    module = OfBatches(3, jax.random.key(0))
    model, params, _ = from_equinox.model(module)
    for rows in (X, X[:5], X[:1]):  # five rows are as many as inputs
        expected = rows @ np.asarray(module.out.weight).T + np.asarray(module.out.bias)
        np.testing.assert_allclose(model(params, None, rows)[0]["logits"], expected, rtol=1e-5)
    trained, _ = model(params, None, X, key=jax.random.key(1), train=True)
    assert set(np.unique(trained["features/hidden"] / X).round(5)) == {0, 2}
    with pytest.raises(ValueError, match="matmul"):  # neither examples nor batches
        model(params, None, X[:, :4])


class OfBatchesWithState(eqx.Module):
    """As networks outside of a training loop of Equinox's are written: all of it over the batch."""

    out: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, classes: int, key: Any) -> None:
        self.out = eqx.nn.Linear(5, classes, key=key)
        self.norm = eqx.nn.BatchNorm(5, "rows", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, state: Any, *, key: Any = None) -> Any:
        over = {"axis_name": "rows", "in_axes": (0, None), "out_axes": (0, None)}
        hidden, state = jax.vmap(self.norm, **over)(x, state)
        return jax.vmap(self.out)(self.dropout(hidden, key=key)), state


def batches_with_state(classes: int, key: Any) -> Any:
    return eqx.nn.make_with_state(OfBatchesWithState)(classes, key)


def test_an_equinox_module_with_state_that_maps_over_the_batch_itself(tmp_path: Path) -> None:
    """Statistics are of the batch in training, and the running ones otherwise; also from a file."""
    net = own.network(batches_with_state, classes=3, example=X[:1])
    params, start = net.init(jax.random.key(0), X[:1])
    _, state = net.apply(params, start, X, key=jax.random.key(1), train=True)
    outputs, same = net.apply(params, state, X)
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(state)))
    module, fresh = batches_with_state(3, jax.random.key(0))  # the same by hand
    module = from_equinox.with_params(module, params)
    _, trained = module(X, fresh, key=jax.random.key(2))
    expected, _ = eqx.nn.inference_mode(module)(X, trained)
    assert not np.allclose(expected, module.out.bias), "it depends on the inputs"
    for rows in (X, X[:5], X[:1]):
        logits = net.apply(params, state, rows)[0]["logits"]
        np.testing.assert_allclose(logits, expected[: len(rows)], rtol=1e-4, atol=1e-5)
    about, path = About("my.py:Net", 3, shape=(5,)), tmp_path / "own.safetensors"
    model_files.save(path, Variables(params, state), about, {"method": "kd"})
    actual = model_files.load(path, model=batches_with_state).predict(X)
    np.testing.assert_allclose(actual, outputs["logits"], rtol=1e-5, atol=1e-6)


def alone(params: Any, x: Any) -> Any:
    return x @ params


def averaged(params: Any, x: Any) -> Any:
    return jnp.mean(x @ params)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Needy, "Needy needs depth, with no known value.*write a factory"),
        ((Pair.init, lambda p, s, x: (x, s)), r"apply\(p, s, x\) is not understood"),
        (Linen(4), r"Linen gives logits \[1, 4\] for one example, expected \[1, 3\]"),
        (lambda: nnx.Linear(5, 3, rngs=nnx.Rngs(0)), "holds one set of weights.*argument rngs"),
        (nnx.Linear(5, 3, rngs=nnx.Rngs(0)), "holds one set of weights.*argument rngs"),
        (Nested("text"), "returns 'features/last' as a str. Every output must be an array"),
        (alone, r"alone\(params, ...\) is a function of parameters.*net = \(init, alone\)"),
        (lambda: {"w": X}, "is dict, not a model. Expected a Linen module"),
        (np.ones(3), "is an array, not a model"),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: (x, x @ p)),
            r"gives logits \[1, 5\] for one example, expected \[1, 3\]",
        ),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: ({"logits": x @ p}, None)),
            'tuple returns a tuple: no "logits". Return an array, or a dict',
        ),
        ((lambda key: jnp.ones((5, 3)), averaged), r"gives logits \[\] for one example"),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: (x @ p).astype(jnp.int32)),
            "gives logits int32, expected floating point",
        ),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: {0: x, "logits": x @ p}),
            "returns an output named 0. Names of outputs must be text",
        ),
        ((lambda key: {}, lambda p, x: x[:, :3]), "has no floating-point parameters"),
        (
            (lambda key: jnp.ones((5, 3)), lambda p, x: {"hidden": x}),
            r"returns \['hidden'\]: no \"logits\"",
        ),
    ],
)
def test_what_is_no_model_says_what_to_write(found: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        own.network(found, classes=3, example=X[:1])


def test_an_equinox_module_without_its_state_says_how_to_make_it() -> None:
    module = Statistics(5, 3, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"Statistics keeps a state.*make_with_state\(Statistics\)"):
        from_equinox.model(module)


def test_one_logit_for_two_classes_is_shown_its_place() -> None:
    with pytest.raises(
        ValueError, match=r"\[1, 1\] for one .* one label of 0 and 1: read .*labels"
    ):
        own.network(Linen(1), classes=2, example=X[:1])
