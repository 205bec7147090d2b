"""
A student that starts from scaled weights
=========================================

Sixteen of the teacher's 64 units per layer are selected and multiplied by α; the student then
trains on labels alone. How accurate are the selected weights on their own, and how much does the
start matter after training?
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

ALPHAS = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]
SEEDS, EPOCHS, EXAMPLES = 6, 10, 300

# %%
# Data and teacher
# ----------------

splits = datasets.standardized(datasets.stratified(datasets.digits()))
data = {
    "inputs": jnp.asarray(splits.train.inputs[:EXAMPLES]),
    "labels": jnp.asarray(splits.train.labels[:EXAMPLES]),
}
test = {"inputs": jnp.asarray(splits.test.inputs), "labels": jnp.asarray(splits.test.labels)}
large = linen.model(models.mlp([64, 64], classes=10))
small = linen.model(models.mlp([16, 16], classes=10))
tx, key = optax.adam(3e-3), jax.random.key(0)


def fit(model, params, data, key, epochs):
    """Trains on labels: all epochs as one scan."""
    step = train.make_step(model.apply, classification, {"task": 1.0}, tx)
    order = jax.lax.map(lambda i: train.epoch_index(key, i, EXAMPLES, 32), jnp.arange(epochs))
    state = train.init_state(params, tx, key=key)
    return train.scan_epoch(step)(state, data, order.reshape(-1, 32))[0].params


def accuracy(params, test):
    logits = small.apply(params, None, test["inputs"])[0]["logits"]
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])


@jax.jit
def trained_teacher(data):
    return fit(large, large.init(key, data["inputs"][:1]).params, data, key, 3 * EPOCHS)


teacher = trained_teacher(data)

# %%
# Select and scale
# ----------------
#
# ``transforms.transfer`` fills a student from a teacher. Shapes that differ are an error unless
# ``on_mismatch`` says what to do; here, to take evenly spaced units. The report names every leaf.

blank = jax.jit(small.init)(key, data["inputs"][:1]).params
selected, transferred = transforms.transfer(teacher, blank, on_mismatch=transforms.select_uniform)
print(transferred)

# %%
# Every α and every seed in one program
# -------------------------------------


def experiment(point, selected, data, test):
    start = transforms.scale(selected, point["alpha"])
    trained = fit(small, start, data, jax.random.key(point["seed"]), EPOCHS)
    return {"before training": accuracy(start, test), "after training": accuracy(trained, test)}


points = sweep.grid(alpha=ALPHAS, seed=range(SEEDS))
found = sweep.vmap(experiment)(points, selected, data, test)

for name, values in found.items():
    intervals = [report.interval(seeds) for seeds in values.reshape(len(ALPHAS), SEEDS)]
    plt.plot(ALPHAS, [x.mean for x in intervals], marker="o", label=name)
    plt.fill_between(ALPHAS, [x.low for x in intervals], [x.high for x in intervals], alpha=0.25)
plt.xscale("log", base=2)
plt.xticks(ALPHAS, [f"{a:g}" for a in ALPHAS])
plt.xlabel("α")
plt.ylabel("test accuracy, %")
plt.legend()
plt.show()

# %%
# After training, the start matters much less than before.
