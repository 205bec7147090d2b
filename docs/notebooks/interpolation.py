"""
Between a model and its fine-tuned version
==========================================

A network for digits is fine-tuned on the same digits, moved two pixels to the right. How well do
the models on the straight line between the two sets of weights solve the old and the new task?
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from kdtl_jax import datasets, models, train, transforms
from kdtl_jax.interop import linen
from kdtl_jax.objective import classification
from kdtl_jax.run import report
from kdtl_jax.train import sweep

SEEDS, EPOCHS, EXAMPLES = 8, 20, 600

# %%
# Two tasks
# ---------

splits = datasets.standardized(datasets.stratified(datasets.digits()))
old = {
    "inputs": jnp.asarray(splits.train.inputs[:EXAMPLES]),
    "labels": jnp.asarray(splits.train.labels[:EXAMPLES]),
}
old_test = {"inputs": jnp.asarray(splits.test.inputs), "labels": jnp.asarray(splits.test.labels)}
new = old | {"inputs": jnp.roll(old["inputs"], 2, axis=2)}
new_test = old_test | {"inputs": jnp.roll(old_test["inputs"], 2, axis=2)}

figure, axes = plt.subplots(2, 6, figsize=(6, 2))
for name, images, row in zip(("old", "new"), (old_test, new_test), axes, strict=True):
    row[0].set_ylabel(name)
    for panel, image in zip(row, images["inputs"], strict=False):
        panel.imshow(image.reshape(8, 8), cmap="gray")
        panel.set_xticks([])
        panel.set_yticks([])
plt.show()

# %%
# Train, fine-tune, interpolate
# -----------------------------
#
# ``transforms.interpolate`` is a pure function of the position on the line, so ``jax.lax.map`` can
# map it inside an experiment that itself runs for all seeds at once.

model = linen.model(models.mlp([64, 64], classes=10))
tx, places = optax.adam(1e-3), jnp.linspace(0.0, 1.0, 11)
step = train.make_step(model.apply, classification, {"task": 1.0}, tx)


def fit(params, data, key):
    order = jax.lax.map(lambda i: train.epoch_index(key, i, EXAMPLES, 32), jnp.arange(EPOCHS))
    state = train.init_state(params, tx, key=key)
    return train.scan_epoch(step)(state, data, order.reshape(-1, 32))[0].params


def accuracy(params, test):
    logits = model.apply(params, None, test["inputs"])[0]["logits"]
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])


def experiment(point, old, new, old_test, new_test):
    key = jax.random.key(point["seed"])
    source = fit(model.init(key, old["inputs"][:1]).params, old, key)
    tuned = fit(source, new, jax.random.fold_in(key, 1))

    def at(place):
        params = transforms.interpolate(source, tuned, place)
        return {"old task": accuracy(params, old_test), "new task": accuracy(params, new_test)}

    return jax.lax.map(at, places)


found = sweep.vmap(experiment)(sweep.grid(seed=range(SEEDS)), old, new, old_test, new_test)

# %%
# Result
# ------

# sphinx_gallery_thumbnail_number = 2
for name, values in found.items():
    intervals = [report.interval(seeds) for seeds in values.T]
    plt.plot(places, [x.mean for x in intervals], marker="o", label=name)
    plt.fill_between(places, [x.low for x in intervals], [x.high for x in intervals], alpha=0.25)
plt.xlabel("position between the source (0) and the fine-tuned model (1)")
plt.ylabel("test accuracy, %")
plt.legend()
plt.show()

# %%
# The old task is forgotten as the new one is learned; here, no point in between keeps both.
