"""Checks that need no data: the terms of methods, and models' layers by name."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from kdtl_jax import methods, trees
from kdtl_jax.interop import model_files, networks
from kdtl_jax.methods import Entry, Setup
from kdtl_jax.recipes import _measures, _models, _pair
from kdtl_jax.recipes.settings import UsageError


def check_layers(settings: Any) -> None:
    """Raises UsageError if a built-in model has no layer of `--layers`.

    User models, and models that do not take the example's size, are checked with the data.
    """
    teacher = settings.teacher or (None if settings.teacher_weights else _pair.DEFAULT_TEACHER)
    example = np.zeros((1, 32, 32, 3), np.float32)
    for i, (role, text) in enumerate((("student", settings.student), ("teacher", teacher))):
        if text is None or model_files.is_own(text) or not settings.layers:
            continue
        try:
            shapes = networks.output_shapes(_models.make_network(text, 2, example), example)
        except ValueError:
            continue
        unknown = [pair[i] for pair in settings.layers if pair[i] not in shapes]
        if unknown:
            taps = ", ".join(sorted(shapes, key=trees.natural_key))
            raise UsageError(f"--layers: the {role} has no tap {unknown[0]!r}. It has {taps}.")


def terms(entries: Sequence[Entry], settings: Any) -> dict[str, Collection[str]] | None:
    """The terms of every method that may be compared, or None if one is user-defined.

    A method has the same terms wherever it applies.
    """
    terms_by_method: dict[str, Collection[str]] = {}
    target = "classes" if settings.data == "digits" else settings.target
    measures = [measure for measure in _measures.ALL if target in ("auto", measure.kind)]
    for entry in (
        entry for measure in measures for entry in _pair.select_methods(entries, settings, measure)
    ):
        if entry not in methods.table():
            return None
        setup = next(setup for setup in _example_setups() if entry.applies(setup) is None)
        terms_by_method[entry.name] = entry.build(setup).weights
    return terms_by_method


@functools.cache
def _example_setups() -> tuple[Setup, ...]:
    """Pairs of small networks, at least one for each method of the table."""
    example, setups = np.zeros((2, 8, 8, 3), np.float32), []
    vit = "vit:patch=4,width=8,layers=2,heads=2"
    pairs = [("cnn:4,4", _measures.CLASSES), (vit, _measures.CLASSES)]
    for text, measure in [*pairs, *(("mlp:4", measure) for measure in _measures.ALL)]:
        net = _models.make_network(text, 3, example)
        variables = _pair.blank(net, example)
        setups.append(
            methods.setup(
                net.apply, net.apply, student_variables=variables, teacher_variables=variables,
                inputs=example, examples=4, steps=2, student_layout=net.layout,
                teacher_layout=net.layout, task=measure.task, exclusive=measure.kind == "classes",
            )
        )  # fmt: skip
    return tuple(setups)
