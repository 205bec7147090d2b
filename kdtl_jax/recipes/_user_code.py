"""User-defined losses and methods, and checks of user code before training.

Only files named on the command line or in the settings, and what they import, are imported. Their
digests are part of the run's identity. Steps are traced on shapes, not run, to report errors at
once, with their lines.
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

EXAMPLES, CLASSES = 8, 3  # the shape that a loss is traced on before the data are read
FEW = 8  # examples in a check of logits
FRESH = 16  # initializations: one label's logits are positive for all of them once in 65,536 times


@dataclass(frozen=True)
class Terms:
    """The settings for the user's own losses and methods."""

    loss: tuple[str, ...] = setting(
        (), "a loss of your own to compare with the methods: fn(student_logits, teacher_logits) "
        "-> one value per example, or fn(inputs) -> a dict of these; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=_imports.checked_all, repeat=True, group="losses",
    )  # fmt: skip
    method: tuple[str, ...] = setting(
        (), "a method of your own: build(setup) -> methods.Method; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=_imports.checked_all, repeat=True, group="losses",
    )  # fmt: skip


def files(settings: Terms) -> dict[str, list[Path]]:
    """The files of losses and methods, and the files they import, by role."""
    return {
        f"{flag.removeprefix('--')} {text.rpartition(':')[2]}": _imports.files_of(text)
        for flag, text in _sources(settings)
    }


def sources_by_name(settings: Terms) -> dict[str, str]:
    """`--loss FILE.py:NAME` or `--method FILE.py:NAME`, keyed by NAME."""
    return {text.rpartition(":")[2]: f"{flag} {text}" for flag, text in _sources(settings)}


def _sources(settings: Terms) -> list[tuple[str, str]]:
    """Flags and their values, losses first."""
    flags = {"--loss": settings.loss, "--method": settings.method}
    return [(flag, text) for flag, texts in flags.items() for text in texts]


def entries(settings: Terms) -> dict[str, Entry]:
    """The user's own methods by name, from `--loss` and `--method`.

    Raises:
      UsageError: if one is not a function with the right arguments, or its name is taken.
      ValueError: if one is wrong regardless of the data, with the line at fault.
    """
    published = {entry.name for entry in methods.table()}
    entries: dict[str, Entry] = {}
    for flag, text in _sources(settings):
        function, name = _imports.imported(text), text.rpartition(":")[2]
        if not callable(function):
            raise UsageError(f"{flag} {text}: {name} is {type(function).__name__}, not a function.")
        if name in published or name in entries:
            raise UsageError(
                f"{flag} {text}: there is already a method called {name!r}. Rename yours."
            )
        make_builder = _loss_builder if flag == "--loss" else _method_builder
        build = make_builder(text, function)

        def applies(setup: Setup, build: Callable[[Setup], Method] = build) -> None:
            build(setup)  # its errors are reported; the method is never left out

        about = (inspect.getdoc(function) or name).splitlines()[0]
        paper = _imports.file_of(text).name
        entries[name] = Entry(name, about, paper, "logits", False, build, applies)
    return entries


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    """A function's required arguments."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _loss_builder(text: str, function: Callable[..., Any]) -> Callable[[Setup], Method]:
    required = _required_arguments(function)
    if len(required) not in (1, 2):
        raise UsageError(
            f"--loss {text}: expected fn(student_logits, teacher_logits) -> one value per example, "
            f"or fn(inputs) -> a dict of these; it takes {required}"
        )
    name = text.rpartition(":")[2]

    def terms(inputs: Inputs) -> Mapping[str, Any]:
        with _imports.importing(text):
            if len(required) == 1:
                return function(inputs)
            return {name: function(inputs.student["logits"], inputs.teacher["logits"])}

    _try_loss(text, terms)

    def build(setup: Setup) -> Method:
        names = _terms_of(text, terms, setup)
        return methods.method(setup, terms, {"task": 1.0, **dict.fromkeys(names, 1.0)})

    return build


def _method_builder(text: str, function: Callable[..., Any]) -> Callable[[Setup], Method]:
    if len(required := _required_arguments(function)) > 1:
        raise UsageError(
            f"--method {text}: expected build(setup) -> methods.Method; it takes {required}"
        )

    def build(setup: Setup) -> Method:
        with _imports.located_errors(text, f"--method {text}"), _imports.importing(text):
            method = function(setup)
        if not isinstance(method, Method):
            raise TypeError(
                f"--method {text}: expected a methods.Method, got {type(method).__name__}. Return "
                "methods.method(setup, terms, weights)."
            )
        weights = {name: in_folder(weight) for name, weight in method.weights.items()}
        return Method(*(in_folder(x) for x in method._replace(weights=weights)))

    def in_folder(value: Any) -> Any:
        return _imports.run_in_folder(text, value) if callable(value) else value

    return build


def _terms_of(text: str, terms: Callable[[Inputs], Any], setup: Setup) -> list[str]:
    """Traces a loss on the shapes of a setup; returns the names of its terms."""
    size = setup.student["logits"].shape[0]
    batch = {
        "inputs": setup.inputs,
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32)
        if setup.exclusive
        else jax.ShapeDtypeStruct((size, setup.classes), jnp.float32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    student: Any = dict(setup.student)
    teacher: Any = dict(setup.teacher)
    inputs = Inputs(student, teacher, batch, setup.params, {}, step=step, key=key)
    outputs = _trace(f"--loss {text}", text, terms, inputs)
    return _checked_terms(text, outputs, size)


def _try_loss(text: str, terms: Callable[[Inputs], Any]) -> None:
    """Raises ValueError for an error in a loss that no data or network could avoid."""
    logits: Any = {"logits": jax.ShapeDtypeStruct((EXAMPLES, CLASSES), jnp.float32)}
    try:
        outputs = jax.eval_shape(terms, Inputs(logits, logits, {}))
    except (NameError, ImportError, AttributeError) as error:
        # Other objects may have the attribute once the networks are known.
        is_certain = not isinstance(error, AttributeError) or isinstance(
            error.obj, (types.ModuleType, Inputs)
        )
        if is_certain:
            raise ValueError(f"--loss {text}: {_imports.locate_error(text, error)}") from error
    except Exception:  # may be due to these shapes; the data's are traced before training
        return
    else:
        _checked_terms(text, outputs, EXAMPLES)


def _checked_terms(text: str, terms: Any, size: int) -> list[str]:
    """Returns the names of the terms; raises ValueError unless each is one value per example."""
    if not isinstance(terms, Mapping):
        raise ValueError(f"--loss {text}: expected a dict of terms, got {type(terms).__name__}.")
    for name, value in terms.items():
        if getattr(value, "shape", None) != (size,):
            shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise ValueError(
                f"--loss {text}: {name!r} must be one value per example, [{size}], got {shape}. Do "
                "not average over the batch: that is done with the weights."
            )
    if "task" in terms:
        raise ValueError(f"--loss {text}: the term 'task' is the labels' own. Rename yours.")
    return list(terms)


# Checks on the shapes of the data and the networks, before any training.


def try_model(flag: str, text: str, net: Network, task: TermsFn, arrays: Mapping[str, Any]) -> None:
    """Traces a training step of a user's model on the shapes of a few examples of `arrays`.

    Raises:
      ValueError: naming the model and, if it is in its file, the line at fault.
    """
    if not model_files.is_own(text):
        return
    tx = optax.sgd(0.1)  # any optimizer works
    step = train.make_step(net.apply, task, {"task": 1.0}, tx)

    def run_step(batch: Any) -> Any:
        key = jax.random.key(0)
        variables = net.init(key, batch["inputs"][:1])
        state = train.init_state(variables.params, tx, key=key, model_state=variables.model_state)
        return step(state, batch)

    _trace(f"{flag} {text}", text, run_step, _shapes(arrays, min(4, len(arrays["labels"]))))


def check_logits(flag: str, text: str, net: Network, data: Dataset) -> None:
    """Warns if a user's model ends in a softmax or a sigmoid.

    This holds for any weights, so a few examples are run through newly initialized ones.
    """
    if not model_files.is_own(text):
        return

    @jax.jit
    def initial_logits(seed: int, inputs: Array) -> Array:
        variables = net.init(jax.random.key(seed), inputs[:1])
        return net.apply(variables.params, variables.model_state, inputs)[0]["logits"]

    inputs, sums = jnp.asarray(data.inputs[:FEW]), True
    for seed in range(FRESH):
        logits = np.asarray(initial_logits(seed, inputs), np.float32)
        if not ((logits >= 0) & (logits <= 1)).all() or not logits.any():
            return
        sums = sums and logits.shape[-1] > 1 and np.allclose(logits.sum(axis=-1), 1, atol=0.01)
    activation = "sigmoid" if data.kind == "labels" else "softmax"
    problem = (
        "its outputs lie between 0 and 1. Targets are standardized, to both sides of 0: return "
        "what is before the model's last activation."
        if data.kind == "numbers"
        else "its logits are probabilities: none is negative, and "
        f"{'every row sums to 1' if sums else 'none is above 1'}. Losses and temperatures apply a "
        f"{activation} themselves: return what is before the model's own."
    )
    print(f"note: {flag} {text}: {problem}", file=sys.stderr)


def try_method(
    source: str, learner: Experiment, arrays: Mapping[str, Any], batch_size: int, frozen: Any
) -> None:
    """Traces a student's step and prediction with a user's loss or method, and a live teacher.

    Args:
      source: `--loss FILE.py:NAME` or `--method FILE.py:NAME`.
      learner: the student.
      arrays: of the training part, `[N, ...]`.
      batch_size: of a step.
      frozen: shapes of the teacher's variables.

    Raises:
      ValueError: naming the loss or method and, if it is in its file, the line at fault.
    """

    def run(point: Any, batch: Any, frozen: Any) -> Array:
        state, _ = learner.step(learner.start(point, frozen), batch, point, frozen)
        return learner.logits(state, batch["inputs"], frozen)

    point, batch = {"seed": jax.ShapeDtypeStruct((), jnp.int32)}, _shapes(arrays, batch_size)
    logits = _trace(source, source.partition(" ")[2], run, point, batch, frozen)
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != batch_size:
        raise ValueError(f"{source}: its predictions must be logits [B, classes], got {logits}.")


def _shapes(arrays: Mapping[str, Any], examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `examples` examples."""
    return {
        name: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype) for name, x in arrays.items()
    }


def _trace(source: str, text: str, run: Callable[..., Any], *args: Any) -> Any:
    with _imports.located_errors(text, source):
        return jax.eval_shape(run, *args)
