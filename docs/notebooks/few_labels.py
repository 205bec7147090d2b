"""
Published methods with few examples
===================================

A student with 32 and 16 hidden units is trained alone and by three published methods, on 50 to 400
examples, with the weights that the methods' authors (or their code) used.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from kdtl_jax import Variables, datasets, methods, models, train
from kdtl_jax.interop import linen
from kdtl_jax.objective import classification
from kdtl_jax.run import report
from kdtl_jax.train import sweep

COUNTS = [50, 100, 200, 400]
SEEDS, STEPS = 5, 200
METHODS = {"alone": methods.alone, "KD": methods.kd, "DIST": methods.dist, "hint": methods.hint}

# %%
# Data and teacher
# ----------------
#
# The teacher has seen all 899 training examples.

splits = datasets.standardized(datasets.stratified(datasets.digits()))
data = {"inputs": jnp.asarray(splits.train.inputs), "labels": jnp.asarray(splits.train.labels)}
test = {"inputs": jnp.asarray(splits.test.inputs), "labels": jnp.asarray(splits.test.labels)}
large = linen.model(models.mlp([128, 64], classes=10))
small = linen.model(models.mlp([32, 16], classes=10))
tx, key = optax.adam(3e-3), jax.random.key(0)

order = np.random.default_rng(0).integers(len(data["labels"]), size=(3 * STEPS, 32))
step = train.make_step(large.apply, classification, {"task": 1.0}, tx)
teacher = train.init_state(jax.jit(large.init)(key, data["inputs"][:1]).params, tx, key=key)
teacher, _ = train.jit_epoch(step)(teacher, data, order)

# %%
# Methods for this pair of models
# -------------------------------
#
# ``methods.setup`` describes the pair by the shapes of its outputs; a method is built from that.

blank = jax.jit(small.init)(key, data["inputs"][:1])
setup = methods.setup(
    small.apply,
    large.apply,
    student_variables=blank,
    teacher_variables=Variables(teacher.params),
    inputs=data["inputs"][:32],
    examples=len(data["labels"]),
    steps=STEPS,
)
for name, build in METHODS.items():
    print(f"{name:6} {build(setup).weights}")

# %%
# Seeds and numbers of examples
# -----------------------------
#
# For each method, all seeds and all numbers of examples are one program. All methods start from the
# same weights and see the same batches, which are therefore made once, outside the program.

starts = jax.jit(jax.vmap(lambda key: small.init(key, data["inputs"][:1]).params))(
    jax.random.split(jax.random.key(1), SEEDS)
)
draws = np.random.default_rng(2).random((SEEDS, STEPS, 32), dtype=np.float32)


def accuracy(build):
    method = build(setup)
    step = train.make_step(small.apply, method.terms, method.weights, tx, teacher=large.apply)

    def experiment(point, starts, draws, data, test, teacher_params):
        seed, key = point["seed"], jax.random.key(point["seed"])
        start = jax.tree.map(lambda x: x[seed], starts)
        state = train.init_state(start, tx, key=key, connectors=method.connectors(key))
        order = (draws[seed] * point["count"]).astype(int)  # of the first `count` examples
        state, _ = train.scan_epoch(step)(state, data, order, teacher_params)
        logits = small.apply(state.params, None, test["inputs"])[0]["logits"]
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == test["labels"])

    points = sweep.grid(count=COUNTS, seed=range(SEEDS))
    found = sweep.vmap(experiment)(points, starts, draws, data, test, teacher.params)
    return found.reshape(len(COUNTS), SEEDS)


for name, build in METHODS.items():
    intervals = [report.interval(seeds) for seeds in accuracy(build)]
    plt.plot(COUNTS, [x.mean for x in intervals], marker="o", label=name)
    plt.fill_between(COUNTS, [x.low for x in intervals], [x.high for x in intervals], alpha=0.25)
plt.xscale("log", base=2)
plt.xticks(COUNTS, [str(n) for n in COUNTS])
plt.xlabel("training examples")
plt.ylabel("test accuracy, %")
plt.legend()
plt.show()

# %%
# KD helps most when examples are few. The hint's weight of 100 was chosen for other networks and
# other data. Choose weights by validation, as ``kdtl sweep`` does.
