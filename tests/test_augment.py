"""Augmentation: functions of their keys, exact in what they move, the same for both models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import augment, losses, train
from kdtl_jax.run import data

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 64)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6, 5, 2)), jnp.float32)
TARGETS = jax.nn.one_hot(jnp.arange(64, dtype=jnp.int32) % 4, 4)

crop1 = jax.jit(partial(augment.crop, padding=1))
flip = jax.jit(augment.flip)
mixup = jax.jit(augment.mixup)
cutmix = jax.jit(augment.cutmix)


def test_example_keys_belong_to_the_example_not_to_its_batch() -> None:
    rows = jnp.array([5, 2, 9], jnp.int32)
    keys = augment.example_keys(KEY, 3, rows)
    alone = augment.example_keys(KEY, jnp.int32(3), rows[1:2])
    raw = jax.random.key_data
    np.testing.assert_array_equal(raw(keys)[1], raw(alone)[0])
    expected = jax.random.fold_in(jax.random.fold_in(KEY, 3), 9)
    np.testing.assert_array_equal(raw(keys)[2], raw(expected))
    others = [raw(augment.example_keys(k, e, rows)) for k, e in ((KEY, 4), (KEYS[0], 3))]
    assert all((raw(keys) != other).any(axis=-1).all() for other in others)
    with pytest.raises(TypeError, match="rows must be integers"):
        augment.example_keys(KEY, 0, jnp.ones(3))


def test_flip_mirrors_columns_of_about_half_the_images() -> None:
    result = np.asarray(flip(KEYS, IMAGES))
    mirrored = (result == np.asarray(IMAGES)[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (result == np.asarray(IMAGES)).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 20 <= mirrored.sum() <= 44  # 64 fair coins: beyond 3 standard deviations
    np.testing.assert_array_equal(flip(KEYS, IMAGES, probability=0.0), IMAGES)
    np.testing.assert_array_equal(flip(KEYS, IMAGES, probability=1.0), IMAGES[:, :, ::-1])


def test_crop_cuts_a_window_of_the_padded_image_every_offset_comes_up() -> None:
    result = np.asarray(crop1(KEYS, IMAGES))
    padded = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image, source in zip(result, padded, strict=True):
        fits = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if (source[top : top + 6, left : left + 5] == image).all()
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9  # missing one of nine in 64 draws: less than one in 200, and fixed
    np.testing.assert_array_equal(augment.crop(KEYS, IMAGES, padding=0), IMAGES)


def test_views_follow_the_key_wherever_the_example_stands() -> None:
    order = np.random.default_rng(1).permutation(64)
    for view in (flip, crop1):
        whole = view(KEYS, IMAGES)
        np.testing.assert_array_equal(view(KEYS[order], IMAGES[order]), whole[order])
        assert (view(jax.random.split(KEYS[0], 64), IMAGES) != whole).any()


def partner_of(row: np.ndarray, share: float, mixed: np.ndarray, x: np.ndarray) -> int:
    """The image of which `mixed` holds `1 - share`."""
    other = (mixed - share * row) / (1 - share)
    distance = np.abs(x - other[None]).reshape(len(x), -1).max(axis=1)
    assert distance.min() < 1e-3
    return int(distance.argmin())


def test_mixup_mixes_inputs_and_targets_alike() -> None:
    x, t = np.asarray(IMAGES), np.asarray(TARGETS)
    mixed, targets = (np.asarray(a) for a in mixup(KEY, IMAGES, TARGETS))
    # One share for the batch: read it off a row whose partner is of another class.
    shares = np.take_along_axis(targets, t.argmax(-1)[:, None], -1)[:, 0]
    share = float(shares.min())
    assert 0.05 < share < 0.95, "choose another key: this one mixes too little to tell"
    partners = [partner_of(x[i], share, mixed[i], x) for i in range(64)]
    assert sorted(partners) == list(range(64)), "every image is a partner once"
    np.testing.assert_allclose(mixed, share * x + (1 - share) * x[partners], atol=1e-5)
    np.testing.assert_allclose(targets, share * t + (1 - share) * t[partners], atol=1e-6)


def test_mixup_draws_its_share_from_the_beta_distribution() -> None:
    x, t = jnp.array([[0.0], [1.0]]), jnp.eye(2)
    keys = jax.random.split(KEY, 2000)
    shares = jax.jit(lambda a: jax.vmap(lambda k: augment.mixup(k, x, t, alpha=a)[1][0, 0])(keys))
    for alpha in (0.2, 4.0):
        # Row 0 keeps itself half of the time; else its share is l. Var l = 1 / (4 (2 a + 1)).
        result = np.asarray(shares(alpha))
        mixed = result[result < 1]
        assert 0.4 < len(mixed) / 2000 < 0.55  # some l round to 1
        assert abs(mixed.mean() - 0.5) < 0.05
        assert abs(mixed.var() * 4 * (2 * alpha + 1) - 1) < 0.15


def test_cutmix_pastes_a_box_and_counts_its_area() -> None:
    x, t = np.asarray(IMAGES), np.asarray(TARGETS)
    areas = []
    for key in KEYS[:12]:
        mixed, targets = (np.asarray(a) for a in cutmix(key, IMAGES, TARGETS))
        changed = (mixed != x).any(axis=(0, 3))
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = np.zeros_like(changed)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(changed, box)
        partner = [
            int(np.flatnonzero((x[:, box] == m[box]).all(axis=(1, 2)))[0]) if box.any() else i
            for i, m in enumerate(mixed)
        ]
        if box.any():
            assert sorted(partner) == list(range(64))
        left = 1 - box.mean()
        np.testing.assert_allclose(targets, left * t + (1 - left) * t[partner], atol=1e-6)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
        areas.append(box.mean())
    assert len(set(areas)) > 4, "boxes of many sizes"


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_real_rows_are_mixed_with_real_rows_alone(mix: Any) -> None:
    where = jnp.arange(64) % 3 != 0
    images = jnp.where(where[:, None, None, None], IMAGES, jnp.nan)
    targets = jnp.where(where[:, None], TARGETS, jnp.nan)
    for seed in range(5):
        x, t = mix(jax.random.key(seed), images, targets, where=where)
        assert bool(jnp.isfinite(x[where]).all() and jnp.isfinite(t[where]).all())
        np.testing.assert_allclose(t[where].sum(0), TARGETS[where].sum(0), rtol=1e-4)
        assert (x[where] != IMAGES[where]).any(axis=(1, 2, 3)).sum() > 20
        assert bool(jnp.isnan(t[~where]).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: augment.flip(KEYS, IMAGES[0]), r"images\[6, 5, 2\]"),
        (lambda: augment.flip(KEYS[:3], IMAGES), r"keys\[3\], images"),
        (lambda: augment.flip(KEY, IMAGES), "keys must have 1 dim"),
        (lambda: augment.flip(KEYS, IMAGES, probability=1.5), "probability"),
        (lambda: augment.crop(KEYS, IMAGES, padding=-1), "at least 0, got -1"),
        (lambda: augment.mixup(KEY, IMAGES, TARGETS[:5]), r"targets\[5, 4\]"),
        (lambda: augment.mixup(KEY, IMAGES, TARGETS, alpha=0.0), "alpha"),
        (lambda: augment.mixup(KEY, IMAGES, TARGETS[:, 0]), "targets"),
        (lambda: augment.cutmix(KEY, IMAGES[..., 0], TARGETS), "images must have 4 dim"),
    ],
)
def test_bad_arguments_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["integers", "images", "targets"])
def test_wrong_dtypes_are_refused(name: str) -> None:
    calls = {
        "integers": lambda: augment.example_keys(KEY, 0, jnp.ones(3)),
        "images": lambda: augment.mixup(KEY, IMAGES.astype(jnp.int32), TARGETS),
        "targets": lambda: augment.cutmix(KEY, IMAGES, TARGETS.astype(jnp.int32)),
    }
    with pytest.raises(TypeError):
        calls[name]()


def mixing(keys: jax.Array, batch: data.Batch) -> data.Batch:
    """Everything at once, as a user would write it."""
    inputs = augment.flip(keys, augment.crop(keys, batch["inputs"], padding=1))
    targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], 4), 0.1)
    inputs, targets = augment.mixup(keys[0], inputs, targets)
    inputs, targets = augment.cutmix(keys[1], inputs, targets)
    return {**batch, "inputs": inputs, "labels": targets}


def test_teacher_and_student_see_one_view(standard_promotion: None) -> None:
    """Equal weights on equal views give equal logits: a KL divergence of exactly 0."""

    def model(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        return {"logits": jnp.tanh(jnp.reshape(inputs, (len(inputs), -1)) @ params)}, model_state

    def terms(x: Any) -> Any:
        student = x.student["logits"]
        task = optax.softmax_cross_entropy(student, x.batch["labels"])
        return {"kd": losses.kd_kl(student, x.teacher["logits"]), "task": task}

    arrays = {"inputs": IMAGES, "labels": jnp.arange(64, dtype=jnp.int32) % 4}
    source = data.resident(arrays, 16, key=KEY, augment=mixing)
    weights = jax.random.normal(KEY, (60, 4))
    tx = optax.sgd(0.0)
    step = train.make_step(model, terms, {"kd": 1.0, "task": 0.0}, tx, teacher=model)

    @jax.jit
    def seen(state: train.TrainState, teacher: Any) -> Any:
        rows = data.epoch_rows(source, jnp.int32(0))
        batch = data.gather(source, rows[0], jnp.int32(0), jnp.int32(0))
        return step(state, batch, teacher)[1], batch["inputs"], rows[0]

    state = train.init_state(weights, tx, key=KEY)
    metrics, inputs, rows = seen(state, weights)
    assert float(train.values(metrics)["kd"]) == 0
    assert float(train.values(seen(state, -weights)[0])["kd"]) > 0.1
    assert (inputs != IMAGES[rows]).any(axis=(1, 2, 3)).all(), "the view is another image"
