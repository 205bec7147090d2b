"""The user's models, losses and methods, tried on shapes before anything is trained.

A training step is traced, not run, which shows errors at once, with their lines.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import train
from kdtl_jax.datasets import Dataset
from kdtl_jax.interop import model_files
from kdtl_jax.interop.networks import Network
from kdtl_jax.objective import TermsFn
from kdtl_jax.recipes import _own
from kdtl_jax.recipes._training import Experiment

FEW = 8  # examples
FRESH = 16  # initializations: one label's logits are positive for all of them once in 65,536 times


def model(flag: str, text: str, net: Network, task: TermsFn, arrays: Mapping[str, Any]) -> None:
    """Traces a training step of a user's model, on a few examples of `arrays`.

    Raises:
      ValueError: naming the model and, if it is in its file, the line at fault.
    """
    if not model_files.is_own(text):
        return
    tx = optax.sgd(0.1)  # any optimizer will do
    step = train.make_step(net.apply, task, {"task": 1.0}, tx)

    def trained(batch: Any) -> Any:
        key = jax.random.key(0)
        first = net.init(key, batch["inputs"][:1])
        state = train.init_state(first.params, tx, key=key, model_state=first.model_state)
        return step(state, batch)

    _traced(f"{flag} {text}", text, trained, shapes(arrays, min(4, len(arrays["labels"]))))


def logits(flag: str, text: str, net: Network, data: Dataset) -> None:
    """Warns if a user's model ends in a softmax or a sigmoid.

    That holds for any weights, so a few examples are run through newly initialized ones.
    """
    if not model_files.is_own(text):
        return

    @jax.jit
    def of_fresh(seed: int, inputs: Array) -> Array:
        fresh = net.init(jax.random.key(seed), inputs[:1])
        return net.apply(fresh.params, fresh.model_state, inputs)[0]["logits"]

    inputs, sums = jnp.asarray(data.inputs[:FEW]), True
    for seed in range(FRESH):
        found = np.asarray(of_fresh(seed, inputs), np.float32)
        if not ((found >= 0) & (found <= 1)).all() or not found.any():
            return
        sums = sums and found.shape[-1] > 1 and np.allclose(found.sum(axis=-1), 1, atol=0.01)
    said = "its logits are probabilities: none is negative, and "
    said += "every row sums to 1." if sums else "none is above 1."
    inner = "sigmoid" if data.kind == "labels" else "softmax"
    repair = f"Losses and temperatures apply a {inner} themselves: return what is before the "
    repair += "model's own."
    if data.kind == "numbers":
        said = "its outputs lie between 0 and 1."
        repair = "Targets are standardized, to both sides of 0: return what is before the model's "
        repair += "last activation."
    print(f"note: {flag} {text}: {said} {repair}", file=sys.stderr)


def method(said: str, learner: Experiment, batch: Mapping[str, Any], frozen: Any) -> None:
    """Traces a student's step with a user's loss or method, and its prediction.

    Args:
      said: `--loss FILE.py:NAME` or `--method FILE.py:NAME`.
      learner: the student.
      batch: shapes of what it reads; `"teacher"` with its outputs, unless the teacher is live.
      frozen: shapes of the variables of a live teacher.

    Raises:
      ValueError: naming the loss or method and, if it is in its file, the line at fault.
    """

    def trained(point: Any, batch: Any, frozen: Any) -> Array:
        state, _ = learner.step(learner.start(point, frozen), batch, point, frozen)
        return learner.logits(state, batch["inputs"], frozen)

    point = {"seed": jax.ShapeDtypeStruct((), jnp.int32)}
    found = _traced(said, said.partition(" ")[2], trained, point, dict(batch), frozen)
    if getattr(found, "ndim", None) != 2 or found.shape[0] != batch["inputs"].shape[0]:
        raise ValueError(f"{said}: its predictions must be logits [B, classes], got {found}.")


def shapes(arrays: Mapping[str, Any], examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of this many examples."""
    return {
        name: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype) for name, x in arrays.items()
    }


def _traced(said: str, text: str, run: Callable[..., Any], *args: Any) -> Any:
    try:
        return jax.eval_shape(run, *args)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{said}: {_own.at_fault(Path(_own.file_of(text)), error)}") from error
