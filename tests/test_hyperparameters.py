"""Hyper-parameters outside the losses: one number where one is meant, whatever would broadcast."""

import re
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
    losses,
    metrics,
    normalization,
    temperatures,
    train,
    transferability,
    transforms,
)
from kdtl_jax.run import checkpoint, loop, sharding
from kdtl_jax.train import (
    balancing,
    ensembles,
    finetune,
    fisher,
    mean_teachers,
    online,
    precision,
    sweep,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

ANY: Any = print  # in place of a function that is never called
TAID = losses.taid_start()
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
    "ema": lambda x: transforms.ema(TREE, TREE, decay=x),
    "follow": lambda x: mean_teachers.follow(ANY, decay=x),
    "scale_by_dot": lambda x: train.dot.scale_by_dot(distill=["kd"], momentum=x),
    "fit_logit_scale": lambda x: temperatures.fit_logit_scale(ROWS, LABELS, low=x),
    "learned_temperature": lambda x: temperatures.learned_temperature(ROWS[0], reversal=x),
    "taid_start": lambda x: losses.taid_start(start=x),
    "taid_advance": lambda x: losses.taid_advance(TAID, ROWS[0, 0], num_steps=3, end=x),
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
    result = language.sampling_log_probs(logits, **{option: jnp.asarray(each)})
    for row, value, got in zip(logits, each, result, strict=True):
        want = language.sampling_log_probs(row, **{option: jnp.asarray(value)})
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for shape in ((1,), (3, 1), (5,)):
        with pytest.raises(ValueError, match="one number or one per example"):
            language.sampling_log_probs(logits, **{option: jnp.full(shape, 0.5)})


# What is a number, or a count, of functions that run nothing before they look at it.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "strength": lambda x: temperatures.adversarial_ramp(3, strength=x),
    "scale": lambda x: temperatures.reverse_gradient(ROWS, x),
    "reversal": lambda x: temperatures.learned_temperature(ROWS[0], reversal=x),
    "eps": lambda x: connectors.variance(eps=x),
    "rate": lambda x: connectors.paraphraser(4, rate=x),
    "initial": lambda x: precision.loss_scaling(optax.sgd(0.1), initial=x),
    "factor": lambda x: precision.loss_scaling(optax.sgd(0.1), factor=x),
    "smallest": lambda x: precision.loss_scaling(optax.sgd(0.1), smallest=x),
    "the weight of 'kd'": lambda x: balancing.remainder({"kd": x}, to="task"),
    "the multiplier of 'a'": lambda x: finetune.multipliers(TREE, [("a", x)]),
    "decay": lambda x: finetune.layer_decay({"a": 0, "b": 1}, decay=x),
    "weights": lambda x: ensembles.over_teachers(losses.mse, weights=[x, 1.0])(ROWS, PAIR),
    "keep": lambda x: sweep.successive_halving(*[ANY] * 3, {"a": LABELS}, rungs=1, keep=x),
    "high": lambda x: sweep.sample(2, a=sweep.Range(0.0, x)),
    "start": lambda x: losses.taid_start(start=x),
    "beta": lambda x: losses.taid_advance(TAID, ROWS[0, 0], num_steps=3, beta=x),
    "anchor": lambda x: losses.distillm2_alpha(CHANNELS, CHANNELS, anchor=x),
    "base": lambda x: losses.distillm2_alpha(CHANNELS, CHANNELS, anchor=0.1, base=x),
    "threshold": lambda x: losses.entropy_aware_kl(ROWS, ROWS, threshold=x),
    "margin": lambda x: losses.hinge_ranking(ROWS, losses.top_k_targets(ROWS, k=2), margin=x),
    "num_data": lambda x: losses.crd(ROWS, num_data=x),
    "alpha": lambda x: transforms.lora(2, x),
    "gamma": lambda x: transforms.lora_ga_start(x),
    "gain": lambda x: transforms.ram(TREE, OTHERS, gain=x),
    "threshold of slerp": lambda x: transforms.slerp(TREE, TREE, 0.5, threshold=x),
    "epsilon": lambda x: transforms.della(KEY, TREE, density=0.5, epsilon=x),
    "shrink": lambda x: transforms.regmean(OTHERS, OTHERS, shrink=x),
    "ridge": lambda x: transforms.regmean(OTHERS, OTHERS, ridge=x),
    "majority": lambda x: transforms.elect_sign_global(OTHERS, majority=x),
    "energy": lambda x: transforms.rank_for_energy(ROWS, x),
    "top_k": lambda x: language.sampling_log_probs(ROWS, top_k=x),
    "share": lambda x: language.on_samples(ANY, ANY, share=x),
}
COUNTS: dict[str, Callable[[Any], Any]] = {
    "padding": lambda x: augment.crop(jax.random.split(KEY, 4), IMAGES, padding=x),
    "num_steps": lambda x: losses.taid_advance(TAID, ROWS[0, 0], num_steps=x),
    "steps": lambda x: temperatures.adversarial_ramp(x),
    "iterations": lambda x: transferability.logme(ROWS, ROWS, iterations=x),
    "num_classes": lambda x: transferability.h_score(ROWS, LABELS, num_classes=x),
    "k": lambda x: discrepancies.bss(ROWS, k=x),
    "k of kdsvd": lambda x: losses.kdsvd([IMAGES] * 2, [IMAGES] * 2, k=x),
    "period": lambda x: precision.loss_scaling(optax.sgd(0.1), period=x),
    "chunk": lambda x: fisher.true_fisher(lambda p, e: p["a"] @ e, TREE, ROWS, chunk=x),
    "batch_size": lambda x: fisher.batch_fisher(lambda p, e: p["a"], TREE, ROWS, batch_size=x),
    "generations": lambda x: online.born_again(ANY, KEY, generations=x),
    "top": lambda x: finetune.layer_decay({"a": 0}, top=x),
    "probe_steps": lambda x: finetune.lp_ft(TREE, head="a", probe_steps=x),
    "the first step of 'a'": lambda x: finetune.unfreeze_gate(TREE, [("a", x)]),
    "rungs": lambda x: sweep.successive_halving(*[ANY] * 3, {"a": LABELS}, rungs=x),
    "n": lambda x: sweep.sample(x, a=[1.0]),
    "draw": lambda x: sweep.sample(1, x, a=[1.0]),
    "size": lambda x: train.epoch_index(KEY, 0, x, 1),
    "rank": lambda x: transforms.lora(x),
    "block_size": lambda x: transforms.oft(x),
    "iterations of karcher": lambda x: transforms.karcher_mean(OTHERS, iterations=x),
    "max_sweeps": lambda x: transforms.match_permutations(TREE, TREE, SPEC, max_sweeps=x),
    "seed": lambda x: transforms.match_permutations(TREE, TREE, SPEC, seed=x),
    "bins": lambda x: metrics.calibration(np.eye(2), np.arange(2), bins=x),
    "classes": lambda x: metrics.confusion(np.arange(2), np.arange(2), x),
    "chunk_size": lambda x: language.policy_gradient(chunk_size=x),
    "groups": lambda x: transforms.top_indices(CHANNELS, 2, groups=x),
    "patience": lambda x: loop.no_improvement("loss", x),
    "log_every": lambda x: loop.run(ANY, STATE, ANY, steps=1, log_every=x),
    "interval": lambda x: checkpoint.newest_and_every(1, x),
    "count": lambda x: checkpoint.newest(x),
    "fsdp": lambda x: sharding.make_mesh(fsdp=x),
}
SPEC = [("a", (None, "hidden"))]
PAIR, STATE = jnp.stack([ROWS, ROWS]), train.init_state(TREE, optax.sgd(0.1), key=KEY)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    bad: Any
    for bad in (None, True, "1", float("nan"), float("inf"), complex(1, 1)):
        if (name, bad) in {("margin", None), ("majority", None), ("top_k", None)}:
            continue  # there None has a meaning
        if (name, bad) == ("weights", True):
            continue  # in a list of numbers it is 1
        with pytest.raises((ValueError, TypeError), match=re.escape(name.split(" of s")[0])):
            NUMBERS[name](bad)


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_count_is_refused_by_name(name: str) -> None:
    bad: Any
    for bad in (None, True, "1", float("nan"), 2.5, -1, np.ones(1), np.ones((4, 1))):
        if bad is None and name in {"top"}:
            continue
        with pytest.raises(
            (ValueError, TypeError), match=rf"{re.escape(name.split(' of k')[0])} must"
        ):
            COUNTS[name](bad)


def test_negative_and_unknown_numbers_are_refused() -> None:
    for call in (
        lambda x: normalized(eps=x),
        lambda x: losses.standardize_logits(ROWS, eps=x),
        lambda x: losses.mft_teacher(ROWS, LABELS, eps=x),
        lambda x: losses.taid_advance(TAID, ROWS[0, 0], num_steps=3, alpha=x),
        lambda x: discrepancies.mk_mmd(ROWS, 2 * ROWS, scale=x),
        lambda x: discrepancies.mk_mmd(ROWS, 2 * ROWS, scale=1.0, alphas=(x,)),
        lambda x: transforms.near_swap(TREE, OTHERS[0], t=x),
        lambda x: transforms.model_stock(TREE, OTHERS, floor=x),
        lambda x: transforms.fisher_merge(OTHERS, OTHERS, floor=x),
    ):
        for bad in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="must be finite and >"):
                call(bad)


def test_bounds_that_leave_nothing_between_them_are_refused() -> None:
    for call in (
        lambda low, high: temperatures.fit_logit_scale(ROWS, LABELS, low=low, high=high),
        lambda low, high: losses.ratio_gate(-ROWS, -ROWS, low=low, high=high),
    ):
        call(2.0, 2.0)
        with pytest.raises(ValueError, match="low must be at most high, got 3"):
            call(3.0, 2.0)


def test_discrepancy_of_equal_features_in_their_own_unit_is_zero() -> None:
    equal = jnp.ones((4, 3))
    scale = discrepancies.mean_squared_distance(equal, equal)
    run = jax.jit(jax.value_and_grad(lambda x: discrepancies.mk_mmd(x, equal, scale=scale)))
    value, slope = run(equal)
    assert value == 0 and not np.asarray(slope).any()


def test_bandwidths_are_a_list_of_numbers() -> None:
    bad: Any
    for bad in ((), 0.5, None):
        with pytest.raises(ValueError, match="alphas must be a list of at least one number"):
            discrepancies.mk_mmd(ROWS, 2 * ROWS, scale=1.0, alphas=bad)
