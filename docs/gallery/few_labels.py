"""Three published methods and the student alone, against the number of training examples.

python docs/gallery/few_labels.py docs/_static/few_labels.svg
"""

import sys
from collections.abc import Sequence
from typing import Any

import figure
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import Variables, methods, models, train
from kdtl_jax.interop import linen
from kdtl_jax.objective import classification
from kdtl_jax.train import sweep

METHODS = {"alone": methods.alone, "KD": methods.kd, "DIST": methods.dist, "hint": methods.hint}


def main(
    out: str, steps: int = 300, seeds: int = 6, counts: Sequence[int] = (50, 100, 200, 400)
) -> None:
    everything, test = figure.digits(899)
    big = linen.model(models.mlp([128, 64], classes=10))
    small = linen.model(models.mlp([32, 16], classes=10))
    key, tx = jax.random.key(0), optax.adam(3e-3)
    blank = big.init(key, everything["inputs"][:1])
    step = train.make_step(big.apply, classification, {"task": 1.0}, tx)
    epochs = [train.epoch_index(key, i, 899, 32) for i in range(30)]
    state, _ = train.jit_epoch(step)(
        train.init_state(blank.params, tx, key=key), everything, jnp.concatenate(epochs)
    )
    taught = Variables(state.params)

    def accuracy(build: Any, data: dict[str, Array]) -> Array:
        count = len(data["labels"])
        pair = (small.apply, big.apply)
        student = small.init(key, data["inputs"][:1])
        setup = methods.setup(
            *pair, student_variables=student, teacher_variables=taught,
            inputs=data["inputs"][:32], examples=count, steps=steps,
        )  # fmt: skip
        method = build(setup)

        def experiment(point: dict[str, Array], data: dict[str, Array], taught: Any) -> Array:
            key = jax.random.key(point["seed"])
            step = train.make_step(small.apply, method.terms, method.weights, tx, teacher=big.apply)
            start = small.init(key, data["inputs"][:1]).params
            state = train.init_state(start, tx, key=key, connectors=method.connectors(key))
            order = jax.random.randint(key, (steps, 32), 0, count)
            state, _ = train.scan_epoch(step)(state, data, order, taught)
            logits = small.apply(state.params, None, test["inputs"])[0]["logits"]
            return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])

        return sweep.vmap(experiment)(sweep.grid(seed=range(seeds)), data, taught)

    first = {n: {name: x[:n] for name, x in everything.items()} for n in counts}
    curves = {
        name: np.stack([accuracy(build, first[n]) for n in counts])
        for name, build in METHODS.items()
    }
    figure.save(out, counts, curves, x="training examples", y="test accuracy, %")


if __name__ == "__main__":
    main(sys.argv[1])
