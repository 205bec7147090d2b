"""The user's own models, losses and methods, from a Python file named as `file.py:name`.

Only files named on the command line or in the settings are imported, with what they import. The
digests of all these files are part of the run's identity.
"""

import contextlib
import functools
import inspect
import re
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import methods
from kdtl_jax.methods import Entry, Method, Setup
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _imports
from kdtl_jax.recipes.settings import UsageError, setting

FORM = "FILE.py:NAME, as in my_model.py:Net"
EXAMPLES, CLASSES = 8, 3  # shapes on which a loss is tried before the data are known


def file_of(text: str) -> str:
    """The file of `file.py:name`."""
    return text.rpartition(":")[0]


def checked(value: Any) -> str | None:
    """`parse=` of a setting: the text itself, if it has the form `file.py:name`."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r".+\.py:[A-Za-z_]\w*", value):
        raise ValueError(f"expected {FORM}, got {value!r:.80}")
    return value


def several(value: Any) -> tuple[str, ...]:
    """`parse=` of a setting that may be repeated."""
    parts = [value] if isinstance(value, str) else list(value or ())
    return tuple(text for part in parts if (text := checked(part)) is not None)


def imported(text: str) -> Any:
    """The object that `file.py:name` names; the file is run once per process and content.

    Raises:
      UsageError: if there is no such file, or no such name in it (its names are listed).
      ValueError: if the file cannot be imported, with the line at fault.
    """
    path, name = Path(file_of(text)), text.rpartition(":")[2]
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    module = _module(path)
    if not hasattr(module, name):
        names = [n for n, x in vars(module).items() if callable(x) and n[0] != "_"]
        raise UsageError(f"{path} has no {name!r}. It has {', '.join(names) or 'nothing'}.")
    return getattr(module, name)


def files_of(text: str) -> list[Path]:
    """The file of `file.py:name` and the user's files that it imports; raises as `imported`."""
    path = Path(file_of(text))
    _module(path)
    return _imports.files(path)


def at_work(text: str) -> contextlib.AbstractContextManager[None]:
    """A context in which the object `imported(text)` finds the modules beside its file."""
    return _imports.at_work(Path(file_of(text)))


def neighborly(text: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the file `text`, or one that calls its functions, run in its folder."""

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        with at_work(text):
            return function(*args, **named)

    return run


def _module(path: Path) -> ModuleType:
    try:
        return _imports.module(path)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        said = at_fault(path, error)
        if ", line " not in said:
            said = f"{path}: {type(error).__name__}: {said}"
        raise ValueError(said) from error


@dataclass(frozen=True)
class Terms:
    """The settings for the user's own losses and methods."""

    loss: tuple[str, ...] = setting(
        (), "a loss of your own to compare with the methods: fn(student_logits, teacher_logits) "
        "-> one value per example, or fn(inputs) -> a dict of these; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=several, repeat=True, group="losses",
    )  # fmt: skip
    method: tuple[str, ...] = setting(
        (), "a method of your own: build(setup) -> methods.Method; only this file and its "
        "imports run; repeat for more", metavar="FILE.py:NAME",
        parse=several, repeat=True, group="losses",
    )  # fmt: skip


def files(settings: Terms) -> dict[str, list[Path]]:
    """The files of losses and methods, and those that they import, by role."""
    both = {"loss": settings.loss, "method": settings.method}
    return {
        f"{role} {text.rpartition(':')[2]}": files_of(text)
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
        function, name = imported(text), text.rpartition(":")[2]
        if not callable(function):
            raise UsageError(f"{flag} {text}: {name} is {type(function).__name__}, not a function.")
        if name in known or name in found:
            raise UsageError(
                f"{flag} {text}: there is already a method called {name!r}. Rename yours."
            )
        build = _of_loss(text, function) if flag == "--loss" else _of_method(text, function)
        about = (inspect.getdoc(function) or name).splitlines()[0]
        applies = _applies(build)
        found[name] = Entry(name, about, Path(file_of(text)).name, "logits", False, build, applies)
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
        with at_work(text):
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
            with at_work(text):
                made = function(setup)
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"--method {text}: {at_fault(Path(file_of(text)), error)}") from error
        if not isinstance(made, Method):
            raise TypeError(
                f"--method {text}: expected a methods.Method, got {type(made).__name__}. Return "
                "methods.method(setup, terms, weights)."
            )
        weights = {name: part(weight) for name, weight in made.weights.items()}
        return Method(*(part(x) for x in made._replace(weights=weights)))

    def part(of: Any) -> Any:
        return neighborly(text, of) if callable(of) else of

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
        raise ValueError(f"--loss {text}: {at_fault(Path(file_of(text)), error)}") from error
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
            said = at_fault(Path(file_of(text)), error)
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


def at_fault(path: Path, error: BaseException) -> str:
    """`my_loss.py, line 3: NameError: ...`, the innermost line of the user's files.

    Only the message if none of their lines is involved.
    """
    inner = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if _imports.is_own(Path(frame.filename))
    ]
    inner += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
    file, line = inner[-1] if inner else (None, None)
    at = path if file is None or Path(file).resolve() == path.resolve() else file
    said = " ".join(str(error).split())
    if line is None:
        return f"{said or type(error).__name__:.500}"
    return f"{at}, line {line}: {type(error).__name__}: {said:.300}"
