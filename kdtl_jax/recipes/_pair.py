"""A teacher and a student on one data set, as `kdtl distill` and `kdtl sweep` use them."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import datasets, methods, train, trees
from kdtl_jax._types import ModelFn, Variables
from kdtl_jax.datasets import Kind, Splits
from kdtl_jax.interop import model_files, networks, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.interop.networks import Network
from kdtl_jax.methods import Entry, Method, Setup
from kdtl_jax.recipes import (
    _data,
    _measures,
    _models,
    _seeds,
    _students,
    _training,
    _user_code,
)
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._training import Experiment, Point
from kdtl_jax.recipes.settings import MODEL, UsageError, setting
from kdtl_jax.run import record

TEACHER, BASELINE = "teacher", "student_alone"
DEFAULT_TEACHER = "mlp:128,64"


@dataclass(frozen=True)
class ModelSettings:
    """The settings of a teacher and a student."""

    teacher: str | None = setting(
        None, f"{MODEL}; default: the model in --teacher-weights, or {DEFAULT_TEACHER}",
        metavar="MODEL", parse=_models.text_of, group="models",
    )  # fmt: skip
    student: str = setting(
        "mlp:16", "as --teacher", metavar="MODEL", parse=_models.text_of, group="models"
    )
    teacher_weights: str | None = setting(
        None,
        "load the teacher instead of training one: a safetensors file, an Orbax folder, or a "
        "Hugging Face folder of an image classifier",
        metavar="FILE",
        group="models",
    )


class Pair(NamedTuple):
    """Data and the two networks to train on it."""

    splits: Splits  # scaled as the teacher's file says, or by the training part
    about: About  # metadata for the files of this pair's models, without the model
    arrays: dict[str, Any]  # of the training part: "inputs", "labels", "index"
    teacher_text: str
    teacher: Network
    student: Network
    teacher_variables: Variables | None  # the teacher's, from its file
    files: dict[str, record.Paths]  # input files: {"data": ..., "teacher_weights": ...}
    example: jax.Array  # inputs [1, ...]
    measure: Measure = _measures.CLASSES  # the task loss and scores


def read_pair(settings: Any, *, dtype: Any = None) -> Pair:
    """Reads the data and the teacher's file, and makes both networks.

    Args:
      settings: `types.Data` and `ModelSettings`.
      dtype: compute dtype of both networks.

    Raises:
      ValueError: if the file has another model, other classes or inputs, or non-finite values.
    """
    source = _models.open_source(settings.teacher_weights, settings.teacher, DEFAULT_TEACHER)
    _models.check(settings.student)
    splits, form = _data.read_data(settings, source)
    _data.check_parts(splits)
    part = splits.train
    index = np.arange(len(part.labels), dtype=np.int32)
    arrays = {"inputs": part.inputs, "labels": part.labels, "index": index}
    example = jnp.asarray(part.inputs[:1])
    texts = {"teacher": str(source.about.model), "student": settings.student}
    teacher, student = (
        _models.make_network(text, part.classes, example, dtype=dtype) for text in texts.values()
    )
    teacher_variables = None
    data_files = datasets.files_of(settings.data, label=settings.label, inputs=settings.inputs)
    files: dict[str, record.Paths] = {"data": data_files}
    if source.path is not None:
        teacher_variables = sources.variables(source, networks.abstract(teacher, example))
        files["teacher_weights"] = source.path
    files |= {role: files_ for role, text in texts.items() if (files_ := _models.files_of(text))}
    about = About(None, part.classes, form.scaling, part.names, part.inputs.shape[1:], form)
    measure = _measures.measure_of_data(form, settings, part)
    for (role, text), net in zip(texts.items(), (teacher, student), strict=True):
        if role == "student" or teacher_variables is None:
            _user_code.try_model(f"--{role}", text, net, measure.task, arrays)
        _user_code.check_logits(f"--{role}", text, net, part)
    return Pair(
        splits,
        about,
        arrays,
        texts["teacher"],
        teacher,
        student,
        teacher_variables,
        files,
        example,
        measure,
    )


def setup(
    pair: Pair,
    frozen: Variables | None,
    *,
    steps: int,
    batch_size: int,
    layers: Sequence[tuple[str, str]] = (),
) -> Setup:
    """The setup of the pair's methods; without `frozen`, with a blank teacher for early checks."""
    inputs = pair.arrays["inputs"]
    return methods.setup(
        pair.student.apply,
        pair.teacher.apply,
        student_variables=networks.abstract(pair.student, pair.example),
        teacher_variables=blank(pair.teacher, pair.example) if frozen is None else frozen,
        inputs=jax.ShapeDtypeStruct((batch_size, *inputs.shape[1:]), inputs.dtype),
        examples=len(inputs),
        steps=steps,
        classes=pair.splits.train.classes,
        layers=tuple(layers) or None,
        student_layout=pair.student.layout,
        teacher_layout=pair.teacher.layout,
        task=pair.measure.task,
        exclusive=pair.measure.kind == "classes",
    )


def blank(net: Network, example: Any) -> Variables:
    """Zeros in the shapes of a network's variables."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), networks.abstract(net, example))


def entries() -> dict[str, Entry]:
    """The table of methods by name."""
    return {entry.name: entry for entry in methods.table()}


def select_methods(entries: Sequence[Entry], settings: Any, measure: Measure) -> list[Entry]:
    """The methods to compare: those requested, or the defaults for the targets."""
    default = next(f.default for f in dataclasses.fields(settings) if f.name == "methods")
    if measure.kind == "classes" or settings.methods != default:
        return list(entries)
    published = {entry.name: entry for entry in methods.table()}
    user_methods = [entry for entry in entries if entry.name not in published]
    return [*(published[name] for name in measure.methods), *user_methods]


def check_any(
    built: Mapping[str, Method], reasons: Sequence[str], setup: Setup, kind: Kind
) -> None:
    """Raises UsageError if none of the methods applies."""
    if len(built) > 1 or not reasons:
        return
    if kind != "classes":
        table = (entry for entry in methods.table() if entry.needs == "logits")
        fitting = [entry.name for entry in table if entry.applies(setup) is None]
        raise UsageError(
            f"the targets are {kind}: {reasons[0]} Methods for them are {', '.join(fitting)}, and "
            "those that match features, such as hint, rkd and sp."
        )
    raise UsageError(f"no method is left. {' '.join(reasons)}")


def check_augmentation(chosen: Sequence[str], pair: Pair) -> None:
    """Raises UsageError if `--augment` does not suit the data or their targets."""
    mixed = [name for name in chosen if name.startswith(("mixup", "cutmix"))]
    if mixed and pair.measure.kind != "classes":
        raise UsageError(
            f"--augment {mixed[0]} mixes classes, but the targets are {pair.measure.kind}."
        )
    if chosen and pair.arrays["inputs"].ndim != 4:
        raise UsageError(
            f"--augment needs images [N, H, W, C], but the data is "
            f"{list(pair.arrays['inputs'].shape)}."
        )


def build(entry: Entry, setup: Setup, temperature: Any) -> Method:
    """A method with the user's temperature, if it has one."""
    if temperature is None or not methods.takes_temperature(entry):
        return entry.build(setup)
    return entry.build(setup, temperature=temperature)


def student(
    net: Network,
    method: Method,
    tx: optax.GradientTransformation,
    init: Callable[[Array, Any], Variables],
    *,
    teacher: ModelFn | None = None,
    microbatches: int = 1,
    view: Callable[..., Any] | None = None,
    per_epoch: int = 1,
) -> Experiment:
    """`net` trained by a method, from `init(key, shared)`.

    Args:
      net: the network to train.
      method: its terms.
      tx: the optimizer.
      init: its initial variables.
      teacher: a live teacher, whose variables are `shared`; None if its outputs are in the batches.
      microbatches: parts of a batch.
      view: augmentation, from `_training.views`.
      per_epoch: steps per epoch, for `view`.
    """
    step = train.make_step(
        net.apply, method.terms, method.weights, tx, teacher=teacher, microbatches=microbatches
    )

    def start(point: Point, shared: Any) -> train.TrainState:
        keys = _training.keys(point["seed"])
        variables = init(keys.model, shared)
        return train.init_state(
            variables.params,
            tx,
            key=keys.steps,
            connectors=method.connectors(keys.connectors),
            model_state=variables.model_state,
            memory=method.memory(keys.memory),
        )

    def one_step(state: Any, batch: Any, point: Point, shared: Any) -> Any:
        if view is not None:
            batch = view(_training.keys(point["seed"]).views, state.step // per_epoch, batch)
        return step(state, batch, None if teacher is None else shared)

    def logits(state: Any, inputs: Any, shared: Any) -> Any:
        if method.predict is None:
            return _training.logits(net, state, inputs)
        outputs, _ = net.apply(state.params, state.model_state, inputs)
        return method.predict(state.connectors, state.memory, outputs)

    return Experiment(start, one_step, logits)


def train_teacher(
    pair: Pair, run: _seeds.SharedRun, task: Method, tx: optax.GradientTransformation, epochs: int
) -> tuple[Variables, _seeds.Trained]:
    """The teacher's variables and results; trains it on the task unless it was loaded."""
    known = pair.teacher_variables

    def init(key: Array, variables: Any) -> Variables:
        return pair.teacher.init(key, pair.example) if known is None else variables

    learner = student(pair.teacher, task, tx, init)
    epochs = epochs if known is None else 0  # which only evaluates it
    trained = _seeds.train_seeds(TEACHER, learner, _training.points(1), known, run, epochs)
    return _training.pick(_training.variables(trained.state), 0), trained


def write(
    folder: Path,
    pair: Pair,
    settings: Any,
    frozen: Variables,
    students: Sequence[_students.SavedStudent],
    setup: Setup,
) -> None:
    """Writes the teacher's file, and one per method's student.

    `setup` has the teacher's head, for methods that predict through connectors.
    """
    about_teacher, about_student = (
        pair.about._replace(model=m) for m in (pair.teacher_text, settings.student)
    )
    metadata = _students.provenance(folder, settings, "teacher")
    model_files.save(folder / "teacher.safetensors", frozen, about_teacher, metadata)
    _students.write(folder, students, about_student, settings, setup)


def build_all(
    entries: Sequence[Entry], setup: Setup, settings: Any
) -> tuple[dict[str, Method], list[str]]:
    """The baseline and the methods that apply, with the user's weights, and notes on the others."""
    built, notes = {BASELINE: methods.alone(setup)}, []
    for entry in entries:
        if (reason := entry.applies(setup)) is None:
            built[entry.name] = build(entry, setup, settings.temperature)
        else:
            notes.append(f"{entry.name} does not apply: {reason}.")
    check_weights(settings.loss_weights, {name: method.weights for name, method in built.items()})
    for key, weight in settings.loss_weights.items():
        method_name, dot, term = key.rpartition(".")
        for name in [method_name] if dot else [name for name in built if name != BASELINE]:
            method = built[name]
            # method.term wins over term
            if term in method.weights and (dot or f"{name}.{term}" not in settings.loss_weights):
                built[name] = method._replace(weights={**method.weights, term: weight})
    return built, notes


def check_weights(weights: Mapping[str, float], terms: Mapping[str, Collection[str]]) -> None:
    """Raises UsageError if a key of `--loss-weights` is not a `term`, or `method.term`."""
    for key in weights:
        name, dot, term = key.rpartition(".")
        candidates = [name] if dot else [method for method in terms if method != BASELINE]
        if not any(term in terms.get(name, ()) for name in candidates):
            listed = "; ".join(
                f"{name}: {', '.join(sorted(method_terms))}" for name, method_terms in terms.items()
            )
            raise UsageError(
                f"--loss-weights: {key!r} is not a term here. The terms are {listed}. Write "
                "term=weight, or method.term=weight for one method."
            )


# Checks that need no data.


def check_layers(settings: Any) -> None:
    """Raises UsageError if a built-in model has no layer of `--layers`.

    User models, and models that do not take the example's size, are checked with the data.
    """
    teacher = settings.teacher or (None if settings.teacher_weights else DEFAULT_TEACHER)
    example = np.zeros((1, 32, 32, 3), np.float32)
    for i, (role, text) in enumerate((("student", settings.student), ("teacher", teacher))):
        if text is None or model_files.is_own(text) or not settings.layers:
            continue
        try:
            net = networks.network(_models.module(text, 2), example)
            shapes = networks.output_shapes(net, example)
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
    target = "classes" if settings.data == "digits" else settings.target
    measures = [measure for measure in _measures.ALL if target in ("auto", measure.kind)]
    candidates = [x for measure in measures for x in select_methods(entries, settings, measure)]
    if any(entry not in methods.table() for entry in candidates):
        return None
    setups = {x.name: next(s for s in _example_setups() if not x.applies(s)) for x in candidates}
    return {entry.name: entry.build(setups[entry.name]).weights for entry in candidates}


@functools.cache
def _example_setups() -> tuple[Setup, ...]:
    """Pairs of small networks, at least one for each method of the table."""
    example, setups = np.zeros((2, 8, 8, 3), np.float32), []
    vit = "vit:patch=4,width=8,layers=2,heads=2"
    pairs = [("cnn:4,4", _measures.CLASSES), (vit, _measures.CLASSES)]
    for text, measure in [*pairs, *(("mlp:4", measure) for measure in _measures.ALL)]:
        net = networks.network(_models.module(text, 3), example)
        variables = blank(net, example)
        setups.append(
            methods.setup(
                net.apply,
                net.apply,
                student_variables=variables,
                teacher_variables=variables,
                inputs=example,
                examples=4,
                steps=2,
                student_layout=net.layout,
                teacher_layout=net.layout,
                task=measure.task,
                exclusive=measure.kind == "classes",
            )
        )
    return tuple(setups)
