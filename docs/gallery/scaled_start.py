"""A student that starts from alpha times selected weights of its teacher, against alpha.

python docs/gallery/scaled_start.py docs/_static/scaled_start.svg
"""

import sys
from typing import Any

import figure
import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import models, train, transforms
from kdtl_jax.interop import linen
from kdtl_jax.objective import classification
from kdtl_jax.train import sweep


def main(out: str, epochs: int = 10, seeds: int = 6, examples: int = 300) -> None:
    data, test = figure.digits(examples)
    big = linen.model(models.mlp([64, 64], classes=10))
    small = linen.model(models.mlp([16, 16], classes=10))
    tx = optax.adam(3e-3)

    def order(key: Array, epochs: int) -> Array:
        return jnp.concatenate([train.epoch_index(key, i, examples, 32) for i in range(epochs)])

    def fit(model: linen.Linen, params: Any, key: Array, epochs: int) -> Any:
        step = train.make_step(model.apply, classification, {"task": 1.0}, tx)
        state = train.init_state(params, tx, key=key)
        return train.scan_epoch(step)(state, data, order(key, epochs))[0].params

    def accuracy(params: Any) -> Array:
        logits = small.apply(params, None, test["inputs"])[0]["logits"]
        return jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])

    key = jax.random.key(0)
    teacher = jax.jit(lambda p: fit(big, p, key, 3 * epochs))(
        big.init(key, data["inputs"][:1]).params
    )
    blank = small.init(key, data["inputs"][:1]).params
    selected, _ = transforms.transfer(teacher, blank, on_mismatch=transforms.select_uniform)

    def experiment(point: dict[str, Array], selected: Any) -> dict[str, Array]:
        start = transforms.scale(selected, point["alpha"])
        return {
            "before training": accuracy(start),
            "after training": accuracy(fit(small, start, jax.random.key(point["seed"]), epochs)),
        }

    alphas = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]
    points = sweep.grid(alpha=alphas, seed=range(seeds))
    found = sweep.vmap(experiment)(points, selected)
    curves = {name: 100 * values.reshape(len(alphas), seeds) for name, values in found.items()}
    figure.save(out, alphas, curves, x="alpha", y="test accuracy, %")


if __name__ == "__main__":
    main(sys.argv[1])
