"""The user's own losses and methods, and what is tried of the user's code before training.

Only files named on the command line or in the settings are imported, with what they import. The
digests of all these files are part of the run's identity. Steps are traced on shapes, not run,
which shows errors at once, with their lines.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import methods, train
from kdtl_jax.datasets import Dataset
from kdtl_jax.interop import model_files
from kdtl_jax.interop.networks import Network
from kdtl_jax.methods import Entry, Method, Setup
from kdtl_jax.objective import Inputs, TermsFn
from kdtl_jax.recipes import _imports
from kdtl_jax.recipes._training import Experiment
from kdtl_jax.recipes.settings import UsageError, setting

EXAMPLES, CLASSES = 8, 3  # shapes on which a loss is tried before the data are known
FEW = 8  # examples that a model is run on
FRESH = 16  # initializations: one label's logits are positive for all of them once in 65,536 times


@dataclass(frozen=True)
class Terms:
    """The settings for the user's own losses and methods."""

    loss: tuple[str, ...] = setting(
        (), "a loss of your own to compare with the methods: fn(student_logits, teacher_logits) "
        "-> one value per example, or fn(inputs) -> a dict of these; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=_imports.several, repeat=True, group="losses",
    )  # fmt: skip
    method: tuple[str, ...] = setting(
        (), "a method of your own: build(setup) -> methods.Method; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=_imports.several, repeat=True, group="losses",
    )  # fmt: skip


def files(settings: Terms) -> dict[str, list[Path]]:
    """The files of losses and methods, and those that they import, by role."""
    both = {"loss": settings.loss, "method": settings.method}
    return {
        f"{role} {text.rpartition(':')[2]}": _imports.files_of(text)
        for role, texts in both.items()
        for text in texts
    }


def named(settings: Terms) -> dict[str, str]:
    """`--loss FILE.py:NAME` or `--method FILE.py:NAME`, by the name."""
    return {text.rpartition(":")[2]: f"{flag} {text}" for flag, text in _given(settings)}


def _given(settings: Terms) -> list[tuple[str, str]]:
    losses, others = settings.loss, settings.method
    return [*(("--loss", text) for text in losses), *(("--method", text) for text in others)]


def entries(settings: Terms) -> dict[str, Entry]:
    """The user's own methods by name, from `--loss` and `--method`.

    Raises:
      UsageError: if one is not a function with the right arguments, or its name is taken.
      ValueError: if one is wrong regardless of the data, with the line at fault.
    """
    known = {entry.name for entry in methods.table()}
    found: dict[str, Entry] = {}
    for flag, text in _given(settings):
        function, name = _imports.imported(text), text.rpartition(":")[2]
        if not callable(function):
            raise UsageError(f"{flag} {text}: {name} is {type(function).__name__}, not a function.")
        if name in known or name in found:
            raise UsageError(
                f"{flag} {text}: there is already a method called {name!r}. Rename yours."
            )
        build = _of_loss(text, function) if flag == "--loss" else _of_method(text, function)
        about = (inspect.getdoc(function) or name).splitlines()[0]
        applies = _applies(build)
        paper = _imports.file_of(text).name
        found[name] = Entry(name, about, paper, "logits", False, build, applies)
    return found


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    plain = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in plain]


def _of_loss(text: str, function: Callable[..., Any]) -> Callable[[Setup], Method]:
    needed = _needed(function)
    if len(needed) not in (1, 2):
        raise UsageError(
            f"--loss {text}: expected fn(student_logits, teacher_logits) -> one value per example, "
            f"or fn(inputs) -> a dict of these; it takes {needed}"
        )
    name = text.rpartition(":")[2]

    def terms(inputs: Inputs) -> Mapping[str, Any]:
        with _imports.at_work(text):
            if len(needed) == 1:
                return function(inputs)
            return {name: function(inputs.student["logits"], inputs.teacher["logits"])}

    _try(text, terms)

    def build(setup: Setup) -> Method:
        names = _terms_of(text, terms, setup)
        return methods.method(setup, terms, {"task": 1.0, **dict.fromkeys(names, 1.0)})

    return build


def _of_method(text: str, function: Callable[..., Any]) -> Callable[[Setup], Method]:
    if len(needed := _needed(function)) > 1:
        raise UsageError(
            f"--method {text}: expected build(setup) -> methods.Method; it takes {needed}"
        )

    def build(setup: Setup) -> Method:
        try:
            with _imports.at_work(text):
                made = function(setup)
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"--method {text}: {_imports.at_fault(text, error)}") from error
        if not isinstance(made, Method):
            raise TypeError(
                f"--method {text}: expected a methods.Method, got {type(made).__name__}. Return "
                "methods.method(setup, terms, weights)."
            )
        weights = {name: part(weight) for name, weight in made.weights.items()}
        return Method(*(part(x) for x in made._replace(weights=weights)))

    def part(of: Any) -> Any:
        return _imports.neighborly(text, of) if callable(of) else of

    return build


def _terms_of(text: str, terms: Callable[[Inputs], Any], setup: Setup) -> list[str]:
    """The names of a loss's terms, each of which must be one value per example."""
    size = setup.student["logits"].shape[0]
    batch = {
        "inputs": setup.inputs,
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32)
        if setup.exclusive
        else jax.ShapeDtypeStruct((size, setup.classes), jnp.float32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }

    def of(params: Any, student: Any, teacher: Any, batch: Any, step: Any, key: Any) -> Any:
        return terms(Inputs(student, teacher, batch, params, {}, step=step, key=key))

    step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    try:
        found = jax.eval_shape(
            of, setup.params, dict(setup.student), dict(setup.teacher), batch, step, key
        )
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--loss {text}: {_imports.at_fault(text, error)}") from error
    return _checked_terms(text, found, size)


def _try(text: str, terms: Callable[[Inputs], Any]) -> None:
    """Raises ValueError for an error in a loss that does not depend on data or networks."""
    logits = {"logits": jax.ShapeDtypeStruct((EXAMPLES, CLASSES), jnp.float32)}
    try:
        found = jax.eval_shape(lambda s, t: terms(Inputs(s, t, {})), logits, logits)
    except (NameError, ImportError, AttributeError) as error:
        # An attribute of something else may exist once the networks are known.
        of_any = not isinstance(error, AttributeError) or isinstance(
            error.obj, (types.ModuleType, Inputs)
        )
        if of_any:
            said = _imports.at_fault(text, error)
            raise ValueError(f"--loss {text}: {said}") from error
    except Exception:  # these shapes may be at fault: the data's own are tried before training
        return
    else:
        _checked_terms(text, found, EXAMPLES)


def _checked_terms(text: str, found: Any, size: int) -> list[str]:
    """The names of the terms, each of which must be one value per example."""
    if not isinstance(found, Mapping):
        raise ValueError(f"--loss {text}: expected a dict of terms, got {type(found).__name__}.")
    for name, value in found.items():
        if getattr(value, "shape", None) != (size,):
            shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise ValueError(
                f"--loss {text}: {name!r} must be one value per example, [{size}], got {shape}. Do "
                "not average over the batch: that is done with the weights."
            )
    if "task" in found:
        raise ValueError(f"--loss {text}: the term 'task' is the labels' own. Rename yours.")
    return list(found)


def _applies(build: Callable[[Setup], Method]) -> Callable[[Setup], str | None]:
    """If a user's own method refuses, that is an error, not a method left out."""

    def applies(setup: Setup) -> str | None:
        build(setup)
        return None

    return applies


# On the shapes of the data and the networks, before anything is trained.


def try_model(flag: str, text: str, net: Network, task: TermsFn, arrays: Mapping[str, Any]) -> None:
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


def check_logits(flag: str, text: str, net: Network, data: Dataset) -> None:
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


def try_method(said: str, learner: Experiment, batch: Mapping[str, Any], frozen: Any) -> None:
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
        raise ValueError(f"{said}: {_imports.at_fault(text, error)}") from error
