"""Hyper-parameters outside the losses: one number where one is meant, whatever would broadcast."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import (
    augment,
    connectors,
    discrepancies,
    language,
    normalization,
    temperatures,
    transferability,
    transforms,
)
from kdtl_jax.train import finetune, mean_teachers, precision

pytestmark = pytest.mark.usefixtures("standard_promotion")

KEY, ROWS, LABELS = jax.random.key(0), jnp.eye(4), jnp.arange(4) % 2
IMAGES, TREE = jnp.ones((4, 4, 4, 1)), {"a": jnp.eye(4)}
CHANNELS = jnp.ones(4)
OTHERS = [{"a": jnp.ones((4, 4))}, {"a": 2 * jnp.eye(4)}]


def normalized(**given: Any) -> Any:
    running = normalization.Running(0 * CHANNELS, CHANNELS)
    return normalization.stoch_norm(ROWS, CHANNELS, CHANNELS, running, CHANNELS > 0, **given)


CASES: dict[str, Callable[[Any], Any]] = {
    "flip": lambda x: augment.flip(jax.random.split(KEY, 4), IMAGES, probability=x),
    "mixup": lambda x: augment.mixup(KEY, IMAGES, ROWS, alpha=x),
    "cutmix": lambda x: augment.cutmix(KEY, IMAGES, ROWS, alpha=x),
    "batch_norm": lambda x: connectors.batch_norm(eps=x),
    "variance": lambda x: connectors.variance(initial=x),
    "stoch_norm eps": lambda x: normalized(eps=x),
    "stoch_norm momentum": lambda x: normalized(momentum=x),
    "transrate": lambda x: transferability.transrate(ROWS, LABELS, num_classes=2, eps=x),
    "adversarial_ramp": lambda x: temperatures.adversarial_ramp(3, strength=x),
    "ema_decay": lambda x: mean_teachers.ema_decay(x),
    "layer_decay": lambda x: finetune.layer_decay({"a": 0, "b": 1}, min_scale=x),
    "loss_scaling": lambda x: precision.loss_scaling(optax.sgd(0.1), initial=x),
    "lora": lambda x: transforms.lora(2, x),
    "ram": lambda x: transforms.ram(TREE, OTHERS, limit=x),
    "rescale_l1": lambda x: transforms.rescale_l1(TREE, OTHERS[0], floor=x),
    "slerp": lambda x: transforms.slerp(TREE, OTHERS[0], 0.5, threshold=x),
    "karcher_mean": lambda x: transforms.karcher_mean(OTHERS, tolerance=x),
    "sce": lambda x: transforms.sce(TREE, OTHERS, top=x),
}


@pytest.mark.parametrize("name", CASES)
def test_arrays_and_complex_numbers_are_refused(name: str) -> None:
    CASES[name](0.5)
    for shape in ((1,), (4,), (4, 1)):
        with pytest.raises(ValueError, match="one number"):
            CASES[name](jnp.full(shape, 0.5))
    with pytest.raises(TypeError, match="real"):
        CASES[name](jnp.asarray(0.5 + 0.1j))


@pytest.mark.parametrize("option", ["temperature", "top_p", "min_p"])
def test_sampling_options_are_one_number_or_one_per_example(option: str) -> None:
    logits = jax.random.normal(KEY, (3, 3, 5))  # as many examples as positions
    each = np.asarray([0.3, 0.6, 0.9], np.float32)
    found = language.sampling_log_probs(logits, **{option: jnp.asarray(each)})
    for row, value, got in zip(logits, each, found, strict=True):
        want = language.sampling_log_probs(row, **{option: jnp.asarray(value)})
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for shape in ((1,), (3, 1), (5,)):
        with pytest.raises(ValueError, match="one number or one per example"):
            language.sampling_log_probs(logits, **{option: jnp.full(shape, 0.5)})


def test_negative_and_unknown_numbers_are_refused() -> None:
    for call in (
        lambda x: normalized(eps=x),
        lambda x: discrepancies.mk_mmd(ROWS, 2 * ROWS, scale=x),
        lambda x: discrepancies.mk_mmd(ROWS, 2 * ROWS, scale=1.0, alphas=(x,)),
        lambda x: transforms.near_swap(TREE, OTHERS[0], t=x),
        lambda x: transforms.model_stock(TREE, OTHERS, floor=x),
        lambda x: transforms.fisher_merge(OTHERS, OTHERS, floor=x),
    ):
        for bad in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="must be finite and >"):
                call(bad)


def test_discrepancy_of_equal_features_in_their_own_unit_is_zero() -> None:
    equal = jnp.ones((4, 3))
    scale = discrepancies.mean_squared_distance(equal, equal)
    run = jax.jit(jax.value_and_grad(lambda x: discrepancies.mk_mmd(x, equal, scale=scale)))
    value, slope = run(equal)
    assert value == 0 and not np.asarray(slope).any()
