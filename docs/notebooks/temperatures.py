"""
Distillation temperature
========================

Students with 12 hidden units learn from a teacher with 128 and 64, at seven temperatures and with
eight seeds each. A temperature is an array like any other, so all 56 runs are one compiled program.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from kdtl_jax import datasets, losses, models, train
from kdtl_jax.interop import linen
from kdtl_jax.objective import classification
from kdtl_jax.run import report
from kdtl_jax.train import sweep

TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
SEEDS, EPOCHS, EXAMPLES = 8, 30, 300

# %%
# Data and teacher
# ----------------
#
# The student sees few examples, so the teacher has something to add.

splits = datasets.standardized(datasets.stratified(datasets.digits()))
data = {
    "inputs": jnp.asarray(splits.train.inputs[:EXAMPLES]),
    "labels": jnp.asarray(splits.train.labels[:EXAMPLES]),
}
large = linen.model(models.mlp([128, 64], classes=10))
small = linen.model(models.mlp([12], classes=10))
tx, key = optax.adam(3e-3), jax.random.key(0)


def order(key):
    """Which examples each step sees: the epochs, one after another."""
    epochs = jax.lax.map(lambda i: train.epoch_index(key, i, EXAMPLES, 32), jnp.arange(EPOCHS))
    return epochs.reshape(-1, 32)


step = train.make_step(large.apply, classification, {"task": 1.0}, tx)
teacher = train.init_state(jax.jit(large.init)(key, data["inputs"][:1]).params, tx, key=key)
teacher, metrics = train.jit_epoch(step)(teacher, data, jax.jit(order)(key))
loss = metrics["task"].value()
print(f"the teacher's loss falls from {loss[0]:.2f} to {loss[-1]:.4f}")

# %%
# One experiment, all settings
# ----------------------------
#
# An experiment is a function of one setting. ``sweep.vmap`` runs it for every setting of a grid.


def experiment(point, teacher_params, data, test):
    def terms(x):
        kd = losses.kd_kl(
            x.student["logits"], x.teacher["logits"], temperature=point["temperature"]
        )
        return {"kd": kd, **classification(x)}

    key = jax.random.key(point["seed"])
    step = train.make_step(small.apply, terms, {"kd": 0.9, "task": 0.1}, tx, teacher=large.apply)
    state = train.init_state(small.init(key, data["inputs"][:1]).params, tx, key=key)
    state, _ = train.scan_epoch(step)(state, data, order(key), teacher_params)
    logits = small.apply(state.params, None, test["inputs"])[0]["logits"]
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])


test = {"inputs": jnp.asarray(splits.test.inputs), "labels": jnp.asarray(splits.test.labels)}
points = sweep.grid(temperature=TEMPERATURES, seed=range(SEEDS))
accuracy = sweep.vmap(experiment)(points, teacher.params, data, test)
accuracy = accuracy.reshape(len(TEMPERATURES), SEEDS)
for temperature, seeds in zip(TEMPERATURES, accuracy, strict=True):
    print(f"temperature {temperature:4g}: {seeds.mean():.1f}%")

# %%
# Result
# ------

found = [report.interval(seeds) for seeds in accuracy]
plt.plot(TEMPERATURES, [x.mean for x in found], marker="o")
plt.fill_between(TEMPERATURES, [x.low for x in found], [x.high for x in found], alpha=0.25)
plt.xscale("log", base=2)
plt.xticks(TEMPERATURES, [f"{t:g}" for t in TEMPERATURES])
plt.xlabel("temperature")
plt.ylabel("test accuracy, %")
plt.show()

# %%
# The intervals overlap from end to end: with these seeds, no temperature is clearly better than
# another. On data of your own, ``kdtl sweep --grid temperature=1,2,4,8`` draws the same comparison.
