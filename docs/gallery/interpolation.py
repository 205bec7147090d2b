"""Between a model and its fine-tuned self: accuracy on the old and on the new task.

python docs/gallery/interpolation.py docs/_static/interpolation.svg
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


def main(out: str, epochs: int = 20, seeds: int = 8, examples: int = 600) -> None:
    old, old_test = figure.digits(examples)
    # The new task: the same digits, two pixels further to the right.
    new, new_test = (x | {"inputs": jnp.roll(x["inputs"], 2, axis=2)} for x in (old, old_test))
    model = linen.model(models.mlp([64, 64], classes=10))
    step = train.make_step(model.apply, classification, {"task": 1.0}, optax.adam(1e-3))

    def fit(params: Any, data: dict[str, Array], key: Array) -> Any:
        state = train.init_state(params, optax.adam(1e-3), key=key)
        order = [train.epoch_index(key, i, examples, 32) for i in range(epochs)]
        return train.scan_epoch(step)(state, data, jnp.concatenate(order))[0].params

    def accuracy(params: Any, test: dict[str, Array]) -> Array:
        logits = model.apply(params, None, test["inputs"])[0]["logits"]
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])

    places = jnp.linspace(0.0, 1.0, 11)

    def experiment(point: dict[str, Array]) -> dict[str, Array]:
        key = jax.random.key(point["seed"])
        source = fit(model.init(key, old["inputs"][:1]).params, old, key)
        tuned = fit(source, new, jax.random.fold_in(key, 1))

        def at(place: Array) -> dict[str, Array]:
            params = transforms.interpolate(source, tuned, place)
            return {"old task": accuracy(params, old_test), "new task": accuracy(params, new_test)}

        return jax.lax.map(at, places)

    found = sweep.vmap(experiment)(sweep.grid(seed=range(seeds)))
    curves = {name: values.T for name, values in found.items()}
    x = "position between the source (0) and the fine-tuned model (1)"
    figure.save(out, places.tolist(), curves, x=x, y="test accuracy, %", log=False)


if __name__ == "__main__":
    main(sys.argv[1])
