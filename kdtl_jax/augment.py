"""Augmentation as pure keyed functions: crop, flip, mixup, CutMix.

Each function takes a key and a batch's arrays, so a view depends only on its key: it is computed
once and given to both teacher and student. `example_keys(key, epoch, rows)` gives every example of
every epoch its own key, independent of its batch, so a teacher cache built from those keys agrees
with a live teacher. `mixup` and `cutmix` mix rows *within* a batch, so they depend on the batch too
and need a live teacher. They take the mask of real examples (`where`, bool `[B]`): a real row is
mixed with a real row, and padded rows are unchanged.

Everything runs inside `jit`, on the device.

TypeError: rows are not integers, mixed arrays are not floating point, or the mask is not bool.
ValueError: shapes do not fit (images are `[B, H, W, C]`, with one key each, and targets `[B, K]`),
a probability is outside [0, 1], a padding is negative, or an alpha (of a Beta distribution) is not
above 0.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks


def example_keys(key: Array, epoch: int | Array, rows: Array) -> Array:
    """Makes keys `[B]`, `fold_in(fold_in(key, epoch), row)`, one per example and epoch.

    Args:
      epoch: the epoch, which selects the view of the data.
      rows: int `[B]`, the examples' rows in the data set.
    """
    _checks.scalar(epoch=epoch)
    _checks.integers(rows=rows, epoch=epoch)
    _checks.key(key=key)
    epoch_key = jax.random.fold_in(key, epoch)
    return jax.vmap(lambda row: jax.random.fold_in(epoch_key, row))(rows)


def flip(keys: Array, images: Array, *, probability: float | Array = 0.5) -> Array:
    """Flips each image horizontally with the given probability.

    Takes `[B]` keys and `[B, H, W, C]` images; returns images of the same shape and dtype.
    """
    _check_images(keys, images)
    _checks.scalar(probability=probability)
    _checks.within(0, 1, probability=probability)
    is_flipped = jax.vmap(lambda k: jax.random.bernoulli(k, probability))(keys)
    return jnp.where(is_flipped[:, None, None, None], images[:, :, ::-1], images)


def crop(keys: Array, images: Array, *, padding: int = 4) -> Array:
    """Pads with zeros and crops a window of the original size at a random position.

    Takes `[B]` keys and `[B, H, W, C]` images; returns images of the same shape and dtype.

    Args:
      padding: pixels added on each side; 4 is the usual value for 32 x 32 images.
    """
    _check_images(keys, images)
    _checks.count(0, padding=padding)
    pad_width = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pad_width)

    def crop_image(key: Array, image: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), images.shape[1:])

    return jax.vmap(crop_image)(keys, padded)


def mixup(
    key: Array,
    inputs: Array,
    targets: Array,
    *,
    alpha: float | Array = 1.0,
    where: Array | None = None,
) -> tuple[Array, Array]:
    """`x = l x_i + (1 - l) x_j`, likewise for targets, with one `l ~ Beta(alpha, alpha)` per batch.

    Args:
      inputs: `[B, ...]`, floating point.
      targets: `[B, K]` class probabilities (`jax.nn.one_hot`, `optax.smooth_labels`).

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    _check_mix(inputs, targets, alpha, where)
    _checks.key(key=key)
    share_key, order_key = jax.random.split(key)
    weight = jax.random.beta(share_key, alpha, alpha)
    partners = _partners(order_key, inputs.shape[0], where)
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    return _blend(weight, inputs, inputs[partners]), _blend(weight, targets, targets[partners])


def cutmix(
    key: Array,
    images: Array,
    targets: Array,
    *,
    alpha: float | Array = 1.0,
    where: Array | None = None,
) -> tuple[Array, Array]:
    """Pastes a box from another image; targets are mixed by the remaining area.

    The box has sides `sqrt(1 - l)` times the image's, with `l ~ Beta(alpha, alpha)`, and a
    uniformly drawn center. It is clipped at the border, and targets use the area actually pasted.
    Takes `[B, H, W, C]` images and `[B, K]` targets; returns both mixed, in their shapes.

    References:
      Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers, ICCV 2019.
    """
    _checks.rank(4, 4, images=images)
    _check_mix(images, targets, alpha, where)
    _checks.key(key=key)
    share_key, order_key, row_key, column_key = jax.random.split(key, 4)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    box_rows = _span(row_key, images.shape[1], side)
    box_columns = _span(column_key, images.shape[2], side)
    in_box = box_rows[:, None] & box_columns[None, :]
    partners = _partners(order_key, images.shape[0], where)
    images, targets = jnp.asarray(images), jnp.asarray(targets)
    mixed = jnp.where(in_box[None, :, :, None], images[partners], images)
    weight = 1 - jnp.mean(in_box.astype(jnp.float32))
    return mixed, _blend(weight, targets, targets[partners])


def _span(key: Array, size: int, side: Array) -> Array:
    """bool `[size]`: a segment of `side * size` pixels around a random center."""
    center = jax.random.uniform(key, (), maxval=float(size))
    pixels = jnp.arange(size, dtype=jnp.float32) + 0.5
    return jnp.abs(pixels - center) < side * (size / 2)


def _partners(key: Array, size: int, where: Array | None) -> Array:
    """A random permutation of the real rows; the others are their own partners."""
    if where is None:
        return jax.random.permutation(key, size)
    random = jax.random.uniform(key, (size,))
    order = jnp.argsort(jnp.where(where, random, jnp.inf))  # the real rows first, shuffled
    return jnp.where(where, order[jnp.cumsum(where) - 1], jnp.arange(size))


def _blend(weight: Array, first: Array, second: Array) -> Array:
    weight = weight.astype(first.dtype)
    return weight * first + (1 - weight) * second


def _check_images(keys: Array, images: Array) -> None:
    _checks.rank(4, 4, images=images)
    _checks.rank(1, 1, keys=keys)
    _checks.same_batch(keys=keys, images=images)


def _check_mix(inputs: Array, targets: Array, alpha: float | Array, where: Array | None) -> None:
    _checks.floating(inputs=inputs, targets=targets)
    _checks.rank(2, 2, targets=targets)
    _checks.same_batch(inputs=inputs, targets=targets)
    _checks.scalar(alpha=alpha)
    _checks.positive(alpha=alpha)
    _checks.mask(where, jnp.shape(inputs)[:1])
