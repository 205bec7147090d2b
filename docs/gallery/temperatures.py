"""Distillation at seven temperatures, eight seeds each, as one compiled program.

python docs/gallery/temperatures.py docs/_static/temperatures.svg
"""

import sys
from typing import Any

import figure
import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import losses, models, train
from kdtl_jax.interop import linen
from kdtl_jax.objective import Inputs, classification
from kdtl_jax.train import sweep


def main(out: str, epochs: int = 30, seeds: int = 8, examples: int = 300) -> None:
    train_set, test = figure.digits(examples)
    big = linen.model(models.mlp([128, 64], classes=10))
    small = linen.model(models.mlp([12], classes=10))
    tx = optax.adam(3e-3)

    def order(key: Array) -> Array:
        return jnp.concatenate([train.epoch_index(key, i, examples, 32) for i in range(epochs)])

    key = jax.random.key(0)
    step = train.make_step(big.apply, classification, {"task": 1.0}, tx)
    teacher = train.init_state(big.init(key, train_set["inputs"][:1]).params, tx, key=key)
    teacher, _ = train.jit_epoch(step)(teacher, train_set, order(key))

    def experiment(point: dict[str, Array], teacher_params: Any, data: dict[str, Array]) -> Array:
        def terms(x: Inputs) -> dict[str, Array]:
            student, taught = x.student["logits"], x.teacher["logits"]
            kd = losses.kd_kl(student, taught, temperature=point["temperature"])
            return {"kd": kd, **classification(x)}

        key = jax.random.key(point["seed"])
        weights = {"kd": 0.9, "task": 0.1}
        step = train.make_step(small.apply, terms, weights, tx, teacher=big.apply)
        state = train.init_state(small.init(key, data["inputs"][:1]).params, tx, key=key)
        state, _ = train.scan_epoch(step)(state, data, order(key), teacher_params)
        logits = small.apply(state.params, None, test["inputs"])[0]["logits"]
        return jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])

    temperatures = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    points = sweep.grid(temperature=temperatures, seed=range(seeds))
    found = sweep.vmap(experiment)(points, teacher.params, train_set)
    accuracy = 100 * found.reshape(len(temperatures), seeds)
    figure.save(out, temperatures, {"distilled": accuracy}, x="temperature", y="test accuracy, %")


if __name__ == "__main__":
    main(sys.argv[1])
