"""Training and evaluation modes, whatever a module calls them."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx

from kdtl_jax import Variables
from kdtl_jax.interop import linen, nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3 + 5
KEY = jax.random.key(1)


class LinenDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool) -> Any:
        return nn.Dropout(0.5)(x, deterministic=deterministic)


class LinenRunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x: Any, use_running_average: bool = True) -> Any:
        return nn.BatchNorm(momentum=0.5)(x, use_running_average)


class LinenTwoFlags(nn.Module):
    @nn.compact
    def __call__(self, x: Any, is_train: bool = True, inference: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not is_train)(x)
        return nn.Dropout(0.5, deterministic=inference)(x)


class LinenField(nn.Module):
    training: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=not self.training)(x)


class LinenKeywords(nn.Module):
    """Passes its keywords on, to a module that takes one of them and no other."""

    @nn.compact
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return LinenRunningAverage()(x, **kwargs)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        frozen = not kwargs.get("is_training", False)
        return nn.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=frozen)(x[None])[
            0
        ]


class NNXTraining(fnnx.Module):
    def __init__(self):
        self.drop = fnnx.Dropout(0.5, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any, *, is_training: bool = True) -> Any:
        return self.drop(x, deterministic=not is_training)


class NNXField(fnnx.Module):
    def __init__(self):
        self.training, self.norm = True, fnnx.BatchNorm(4, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.norm(x, use_running_average=not self.training)


class NNXKeywords(fnnx.Module):
    def __init__(self):
        self.norm = fnnx.BatchNorm(4, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return self.norm(x, use_running_average=not kwargs.get("training", True))


class EquinoxEnabled(eqx.Module):
    drop: Any = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, enable_dropout: bool = False, key: Any = None) -> Any:
        return self.drop(x, inference=not enable_dropout, key=key)


class EquinoxField(eqx.Module):
    drop: Any = eqx.nn.Dropout(0.5)
    training: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Any, key: Any = None) -> Any:
        return self.drop(x, inference=not self.training, key=key)


class EquinoxKeywords(eqx.Module):
    drop: Any = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return self.drop(x, inference=kwargs.get("inference", True), key=kwargs.get("key"))


class LinenRequired(nn.Module):
    @nn.compact
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return nn.Dropout(0.5, deterministic=not kwargs["training"])(x)


class LinenUnset(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=self.deterministic)(x)


class LinenNumpy(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: Any = np.False_) -> Any:
        return nn.Dropout(0.5, deterministic=not train)(x)


class LinenNumber(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: int = 0) -> Any:
        return nn.Dropout(0.5, deterministic=not train)(x)


class LinenOwnStatistics(nn.Module):
    @nn.compact
    def __call__(self, x: Any, update_stats: bool = False, learning: bool = False) -> Any:
        mean = self.variable("batch_stats", "mean", jnp.zeros, (4,))
        if update_stats or learning:
            mean.value = x.mean(0)
        return x - mean.value


class NNXOwnStatistics(fnnx.Module):
    def __init__(self):
        self.mean = fnnx.BatchStat(jnp.zeros(4))

    def __call__(self, x: Any, train: bool = True) -> Any:
        if train:
            self.mean.set_value(x.mean(0))
        return x - self.mean.get_value()


class NNXAttention(fnnx.Module):
    def __init__(self):
        make = fnnx.MultiHeadAttention
        self.inner = make(1, 4, dropout_rate=0.5, decode=False, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any, train: bool = False, learning: bool = False) -> Any:
        return self.inner(x[None], deterministic=not (train or learning))[0]


class NNXRecurrent(fnnx.Module):
    def __init__(self):
        self.recurrent = fnnx.RNN(fnnx.LSTMCell(4, 4, rngs=fnnx.Rngs(0)))
        self.layers = fnnx.List([fnnx.BatchNorm(4, rngs=fnnx.Rngs(0))])

    def __call__(self, x: Any) -> Any:
        carried: Any = self.recurrent(x[:, None])
        return self.layers[0](carried[:, 0])


def haiku_deterministic(x: Any, deterministic: bool) -> Any:
    return x if deterministic else hk.dropout(hk.next_rng_key(), 0.5, x)


def haiku_keyword(x: Any, *, is_training: bool) -> Any:
    return hk.BatchNorm(True, True, 0.5)(x, is_training=is_training)


def of_linen(module: Any) -> tuple[Any, Variables]:
    model = linen.model(module)
    return model.apply, model.init(jax.random.key(0), X)


def of_nnx(module: Any) -> tuple[Any, Variables]:
    model = nnx.model(module)
    return model.apply, Variables(model.params, model.model_state)


def of_equinox(module: Any, state: Any = None) -> tuple[Any, Variables]:
    from kdtl_jax.interop import equinox

    model = equinox.model(module, state)
    return model.apply, Variables(model.params, model.model_state)


def of_haiku(net: Any) -> tuple[Any, Variables]:
    from kdtl_jax.interop import haiku

    model = haiku.model(net)
    return model.apply, model.init(jax.random.key(0), X)


CASES = {
    "linen deterministic": lambda: of_linen(LinenDeterministic()),
    "linen use_running_average": lambda: of_linen(LinenRunningAverage()),
    "linen two flags": lambda: of_linen(LinenTwoFlags()),
    "linen field": lambda: of_linen(LinenField()),
    "linen kwargs passed on": lambda: of_linen(LinenKeywords()),
    "linen attention": lambda: of_linen(LinenAttention()),
    "linen required": lambda: of_linen(LinenRequired()),
    "linen unset field": lambda: of_linen(LinenUnset()),
    "linen NumPy bool": lambda: of_linen(LinenNumpy()),
    "linen number": lambda: of_linen(LinenNumber()),
    "linen own statistics": lambda: of_linen(LinenOwnStatistics()),
    "nnx own statistics": lambda: of_nnx(NNXOwnStatistics()),
    "nnx attention": lambda: of_nnx(NNXAttention()),
    "nnx recurrent": lambda: of_nnx(NNXRecurrent()),
    "nnx is_training": lambda: of_nnx(NNXTraining()),
    "nnx field": lambda: of_nnx(NNXField()),
    "nnx kwargs": lambda: of_nnx(NNXKeywords()),
    "equinox enable_dropout": lambda: of_equinox(EquinoxEnabled()),
    "equinox static field": lambda: of_equinox(EquinoxField()),
    "equinox kwargs": lambda: of_equinox(EquinoxKeywords()),
    "haiku deterministic": lambda: of_haiku(haiku_deterministic),
    "haiku keyword": lambda: of_haiku(haiku_keyword),
    "haiku by position": lambda: of_haiku(haiku_by_position),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_trains_in_training_mode_and_is_evaluated_in_evaluation_mode(case: str) -> None:
    apply, v = CASES[case]()

    def run(x: Any, train: bool) -> np.ndarray:
        return np.asarray(apply(v.params, v.model_state, x, key=KEY, train=train)[0]["logits"])

    inputs = 2 * X + 1  # other than those that a model started from
    evaluated = run(inputs, False)
    if "attention" not in case:  # whose examples see each other
        np.testing.assert_allclose(run(inputs[:1], False)[0], evaluated[0], rtol=1e-5)
    assert not np.allclose(run(inputs, True), evaluated)
    other = apply(v.params, v.model_state, inputs, key=jax.random.key(2))[0]["logits"]
    np.testing.assert_array_equal(other, evaluated)


class LinenAlwaysFrozen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=True)(x)


class LinenNeverFrozen(nn.Module):
    @nn.compact
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        frozen = kwargs.get("fixed", False)
        return nn.BatchNorm(use_running_average=frozen)(x)


class NNXNeverFrozen(fnnx.Module):
    def __init__(self):
        self.norm = fnnx.BatchNorm(4, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any, learning: bool = True) -> Any:
        return self.norm(x, use_running_average=not learning)


class LinenOwnFrozen(nn.Module):
    @nn.compact
    def __call__(self, x: Any, learning: bool = False) -> Any:
        return LinenOwnStatistics()(x, learning=learning)


class NNXAttentionFrozen(NNXAttention):
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # no usual flag, on purpose
        self, x: Any, learning: bool = False
    ) -> Any:
        return super().__call__(x, learning=learning)


class NNXOwnDropout(fnnx.Module):
    def __init__(self):
        self.rngs = fnnx.Rngs(0)

    def __call__(self, x: Any, learning: bool = True) -> Any:
        return x * jax.random.bernoulli(self.rngs(), 0.5, x.shape) if learning else x


class EquinoxOwnDropout(eqx.Module):
    def __call__(self, x: Any, key: Any = None) -> Any:
        return x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)


class LinenOwnDropout(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)


class EquinoxOwnStatistics(eqx.Module):
    index: Any

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.zeros(4))

    def __call__(self, x: Any, state: Any, learning: bool = False) -> Any:
        if learning:
            state = state.set(self.index, jax.lax.pmean(x, "batch"))
        return x - state.get(self.index), state


def haiku_local(x: Any, train: Any) -> Any:
    return hk.BatchNorm(True, True, 0.5)(x, train, test_local_stats=True)


def haiku_by_position(x: Any, train: Any, /) -> Any:
    return hk.BatchNorm(True, True, 0.5)(x, train)


class EquinoxAlwaysFrozen(eqx.Module):
    drop: Any = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, learning: bool = False, key: Any = None) -> Any:
        return self.drop(x, inference=not learning, key=key)


@pytest.mark.parametrize(
    ("make", "train"),
    [
        (lambda: of_linen(LinenAlwaysFrozen()), True),
        (lambda: of_linen(LinenNeverFrozen()), False),
        (lambda: of_nnx(NNXNeverFrozen()), False),
        (lambda: of_equinox(EquinoxAlwaysFrozen()), True),
        (lambda: of_linen(LinenOwnFrozen()), True),
        (lambda: of_nnx(NNXAttentionFrozen()), True),
        (lambda: of_nnx(NNXOwnDropout()), False),
        (lambda: of_equinox(EquinoxOwnDropout()), False),
        (lambda: of_equinox(*eqx.nn.make_with_state(EquinoxOwnStatistics)()), True),
        (lambda: of_haiku(lambda x, train: hk.BatchNorm(True, True, 0.5)(x, True)), False),
        (lambda: of_haiku(haiku_local), False),
        (lambda: of_haiku(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x)), False),
    ],
    ids=[
        *("linen frozen", "linen kwargs", "nnx", "equinox", "linen own statistics"),
        *("nnx attention", "nnx own dropout", "equinox own dropout", "equinox own statistics"),
        *("haiku", "haiku local statistics", "haiku dropout"),
    ],
)
def test_a_mode_that_cannot_be_set_is_refused_and_the_call_is_shown(make: Any, train: bool) -> None:
    apply, v = make()
    with pytest.raises(ValueError, match="mode.*lambda .*x, .*train"):
        apply(v.params, v.model_state, X, key=KEY, train=train)


def test_dropout_of_a_linen_modules_own_making_has_no_randomness_in_evaluation() -> None:
    apply, v = of_linen(LinenOwnDropout())
    apply(v.params, v.model_state, X, key=KEY, train=True)
    with pytest.raises(ValueError, match='needs PRNG for "dropout".*say how to call it: linen'):
        apply(v.params, v.model_state, X, key=KEY)


def test_a_call_of_ones_own_is_believed() -> None:
    frozen = linen.model(LinenAlwaysFrozen(), call=lambda module, x, train: module(x))
    v = frozen.init(KEY, X)
    frozen.apply(v.params, v.model_state, X, key=KEY, train=True)
    own = nnx.model(NNXNeverFrozen(), call=lambda module, x, train: module(x, learning=train))
    outputs, _ = own.apply(own.params, own.model_state, X, train=False)
    alone, _ = own.apply(own.params, own.model_state, X[:1], train=False)
    np.testing.assert_allclose(alone["logits"][0], outputs["logits"][0], rtol=1e-5)


def test_frozen_statistics_beside_a_dropout_that_trains_are_the_authors_choice() -> None:
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    apply, v = of_linen(Both())
    apply(v.params, v.model_state, X, key=KEY, train=True)


def test_haiku_functions_without_a_mode() -> None:
    apply, v = of_haiku(lambda x: hk.Linear(2)(x))
    assert apply(v.params, None, X)[0]["logits"].shape == (6, 2)
    for net in (lambda x, a, b: x, lambda x, state: x, lambda x, rate: x, lambda x, mask=None: x):
        with pytest.raises(TypeError, match=r"net must take its inputs and train .*\['x', "):
            of_haiku(net)
