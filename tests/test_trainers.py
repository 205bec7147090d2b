"""The losses of examples/trainers.py in other people's loops."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_language_methods import DECODER, STUDENT, TEACHER, batch, dense

from kdtl_jax import language, losses

pytestmark = pytest.mark.usefixtures("standard_promotion")
FILE = Path(__file__).parent.parent / "examples" / "trainers.py"


def trainers() -> Any:
    spec = importlib.util.spec_from_file_location("trainers", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected() -> tuple[jax.Array, jax.Array]:
    """Sum over learned tokens and their number."""
    inputs = batch()["inputs"]
    _, where = language.next_tokens(inputs)
    values = losses.forward_kl(dense(inputs, STUDENT), dense(inputs, TEACHER))
    return jnp.sum(values * where), jnp.sum(where)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


class Tiny(nnx.Module):
    """The decoder of the tests as an NNX module, with the calls of two libraries."""

    def __init__(self, params: Any):
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def logits(self, tokens: Any, segments: Any) -> jax.Array:
        params = jax.tree.map(lambda x: x[...], self.params, is_leaf=is_variable)
        hidden, _ = DECODER.apply(params, tokens, None, segments)
        return losses.head_logits(hidden, DECODER.head(params))

    def __call__(self, tokens: Any, positions: Any, cache: Any = None, attention_mask: Any = None):
        return self.logits(tokens, jnp.ones(tokens.shape, jnp.int32)), None


def test_maxtexts_keys_hold_our_rows_and_its_loss_is_a_sum_and_a_weight():
    inputs = batch()["inputs"]
    data = language.maxtext_batch(inputs)
    assert set(data) == {
        f"{side}{end}"
        for side in ("inputs", "targets")
        for end in ("", "_position", "_segmentation")
    }
    targets, where = language.next_tokens(inputs)
    np.testing.assert_array_equal(data["targets_segmentation"] != 0, where)
    np.testing.assert_array_equal(np.where(where, data["targets"], 0), np.where(where, targets, 0))

    def apply(params: Any, tokens: Any, positions: Any, segments: Any) -> jax.Array:
        hidden, _ = DECODER.apply(params, tokens, positions, segments)
        return losses.head_logits(hidden, DECODER.head(params))

    total, weight = trainers().maxtext_loss(apply, STUDENT, TEACHER, data)
    hard = optax.softmax_cross_entropy_with_integer_labels(dense(inputs, STUDENT), targets)
    np.testing.assert_allclose(weight, expected()[1])
    np.testing.assert_allclose(total, 0.9 * expected()[0] + 0.1 * jnp.sum(hard * where), rtol=1e-5)


def test_tunixs_loss_is_a_sum_and_a_weight(monkeypatch: pytest.MonkeyPatch):
    class WeightedMetric(NamedTuple):
        unreduced_sum: Any
        denominator: Any

    class LossOutput(NamedTuple):
        primary_loss: Any
        aux_metrics: Any

    utils: Any = ModuleType("utils")
    utils.LossOutput, utils.WeightedMetric = LossOutput, WeightedMetric
    sft: Any = ModuleType("tunix.sft")
    sft.utils = utils
    for name, module in (("tunix", ModuleType("tunix")), ("tunix.sft", sft)):
        monkeypatch.setitem(sys.modules, name, module)
    tokens = batch()["inputs"]["tokens"]
    mask = np.random.default_rng(1).random(tokens.shape) < 0.7
    result = trainers().tunix_loss(Tiny(TEACHER))(Tiny(STUDENT), tokens, mask, None, None)
    values = losses.forward_kl(*(Tiny(p)(tokens, None)[0] for p in (STUDENT, TEACHER)))
    kd = result.primary_loss
    np.testing.assert_allclose(kd.unreduced_sum, jnp.sum(values[:, :-1] * mask[:, 1:]), rtol=1e-5)
    assert float(kd.denominator) == mask[:, 1:].sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix's own
def test_tunix_itself_learns_from_the_loss():
    trainer = pytest.importorskip("tunix.sft.peft_trainer", reason="Tunix is not installed")
    config = trainer.TrainingConfig(eval_every_n_steps=100, max_steps=8)
    model = Tiny(STUDENT)
    result = trainer.PeftTrainer(model, optax.adam(1e-2), config)
    result = result.with_loss_fn(trainers().tunix_loss(Tiny(TEACHER)))
    tokens = jnp.asarray(batch()["inputs"]["tokens"])
    given = {"input_tokens": tokens, "input_mask": jnp.ones(tokens.shape)}
    given |= {"positions": None, "attention_mask": None}
    result = result.with_gen_model_input_fn(
        lambda x: {**x, "positions": None, "attention_mask": None}
    )

    def away() -> float:
        teacher, own = Tiny(TEACHER)(tokens, None)[0], model(tokens, None)[0]
        return float(losses.forward_kl(own, teacher)[:, :-1].mean())

    before = away()
    result.train([given] * 8, None)
    assert away() < before


def test_plain_loops_of_nnx_and_equinox_learn():
    module, inputs = trainers(), jax.tree.map(jnp.asarray, batch()["inputs"])
    mean = float(expected()[0] / expected()[1])

    class Called(Tiny):
        def __call__(self, tokens: Any, segments: Any) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]  # two inputs, as the loops call it
            return self.logits(tokens, segments)

    student, teacher = Called(STUDENT), Called(TEACHER)
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    values = [float(module.nnx_step(student, teacher, optimizer, inputs)) for _ in range(4)]
    np.testing.assert_allclose(values[0], mean, rtol=1e-4)
    assert values[-1] < values[0]

    import equinox as eqx

    class Row(eqx.Module):
        params: Any

        def __call__(self, tokens: Any, segments: Any) -> jax.Array:
            hidden, _ = DECODER.apply(self.params, tokens[None], None, segments[None])
            return losses.head_logits(hidden, DECODER.head(self.params))[0]

    model, tx = Row(STUDENT), optax.adam(1e-2)
    opt_state, frozen = tx.init(eqx.filter(model, eqx.is_inexact_array)), Row(TEACHER)
    for expect in values:
        model, opt_state, value = module.equinox_step(model, frozen, opt_state, tx, inputs)
        np.testing.assert_allclose(value, expect, rtol=1e-4)
