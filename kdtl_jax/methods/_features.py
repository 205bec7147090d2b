"""Methods of features that mean the same on vectors and on maps: most regress behind a connector.

Where a paper has one connector per layer, so has every matched pair here.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params
from kdtl_jax.connectors import Connector
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_memory
from kdtl_jax.objective import Inputs

MASKED = 0.15  # MGD's share of channels for classifiers


def regressor(channels: int) -> Connector:
    """RepDistiller's: a 1x1 convolution, batch normalization, ReLU."""
    return connectors.chain(projection(channels), connectors.activation(jax.nn.relu))


def projection(channels: int) -> Connector:
    """A 1x1 convolution and batch normalization."""
    return connectors.chain(connectors.conv1x1(channels), connectors.batch_norm())


def _ickd(student: Array, teacher: Array) -> Array:
    """Summed over rows, as published: `C` times the mean over entries."""
    return teacher.shape[-1] * losses.ickd(student, teacher)


def _cosine(student: Array, teacher: Array) -> Array:
    """Averaged over positions, where there are any."""
    values = losses.cosine_distance(student, teacher)
    return jnp.mean(values.reshape(len(values), -1), axis=1)


def _build_vid(setup: Setup, options: Options) -> Built:
    sides = _views.shapes(_views.matched, setup.pairs, setup)
    wide = [teacher.shape[-1] for _, teacher in sides]
    means = [connectors.mlp((n, n, n), bias=False) for n in wide]
    variance = connectors.variance()

    def init(key: Array) -> Params:
        students, teachers = zip(*sides, strict=True)
        variances = [variance] * len(sides)
        return _views.init_each(means, students, key) | _views.init_each(
            variances, teachers, key, prefix="variance"
        )

    def terms(inputs: Inputs) -> dict[str, Array]:
        params = inputs.connectors
        features = _views.viewed(_views.matched, setup.pairs, inputs.student, inputs.teacher)
        values = [
            losses.vid(mean, teacher, variance.apply(params[f"variance_{i}"], teacher))
            for i, (mean, teacher) in enumerate(_builders.connected(means, params, features))
        ]
        return {"vid": sum(values[1:], values[0])}

    return Built(terms, {TASK: 1.0, "vid": 1.0}, init, no_memory)


def _build_srd(setup: Setup, options: Options) -> Built:
    """Both sides batch-normalized, the student projected; beside KD at temperature 1."""
    of_student, of_teacher = setup.last
    teacher_shape = setup.teacher[of_teacher]
    project = projection(teacher_shape.shape[-1])
    norm = connectors.batch_norm()
    plain = norm.init(jax.random.key(0), teacher_shape)  # no scale or offset to learn here
    temperature = _builders.chosen(options, 1.0)

    def terms(inputs: Inputs) -> dict[str, Array]:
        params = inputs.connectors
        student = project.apply(params, inputs.student[of_student])
        teacher = norm.apply(plain, inputs.teacher[of_teacher])
        logits = inputs.student["logits"], inputs.teacher["logits"]
        return {
            "srd": losses.srd(student, teacher),
            "kd": losses.kd_kl(*logits, temperature=temperature),
        }

    def init(key: Array) -> Params:
        return project.init(key, setup.student[of_student])

    return Built(terms, {TASK: 1.0, "srd": 1.0, "kd": 1.0}, init, no_memory)


def _build_mgd(setup: Setup, options: Options) -> Built:
    """Some of the student's channels are dropped, the teacher's generated from the rest."""
    sides = _views.shapes(_views.matched_maps, _views.deepest_pair(setup), setup)
    (student_shape, teacher_shape) = sides[0]
    channels = teacher_shape.shape[-1]
    align, generate = connectors.conv1x1(channels), connectors.generator(channels)

    def init(key: Array) -> Params:
        key_align, key_generate = jax.random.split(key)
        return {
            "align": align.init(key_align, student_shape),
            "generator": generate.init(key_generate, teacher_shape),
        }

    def terms(inputs: Inputs) -> dict[str, Array]:
        params, (key, _) = inputs.connectors, _builders.clock(inputs)
        [(student, teacher)] = _views.viewed(
            _views.matched_maps, _views.deepest_pair(setup), inputs.student, inputs.teacher
        )
        student = align.apply(params["align"], student)
        keep = jax.random.bernoulli(key, 1 - MASKED, (len(student), 1, 1, channels))
        masked = jnp.where(keep, student, jnp.zeros((), student.dtype))
        generated = generate.apply(params["generator"], masked)
        return {"mgd": losses.squared_distance(generated, teacher)}

    return Built(terms, {TASK: 1.0, "mgd": 7e-5}, init, no_memory)


def _features(
    name: str,
    title: str,
    paper: str,
    build: _builders.Build,
    *,
    connector: bool = True,
    applies: _views.Applies = _views.matched_layers,
) -> Method:
    return Method(name, title, paper, "features", connector, build, applies)


METHODS = (
    _features(
        "hint",
        "FitNets hint of the middle layer",
        "Romero et al., 1412.6550, 2015",
        _builders.over_pairs(
            "hint",
            losses.mse,
            _builders.constant({"hint": 100.0}),
            pairs=_views.middle_pair,
            connector=regressor,
        ),
    ),
    _features(
        "cosine",
        "Cosine hint of every layer",
        "Sanh et al., 1910.01108, 2019",
        _builders.over_pairs(
            "cosine",
            _cosine,
            _builders.constant({"cosine": 1.0}),
            connector=connectors.linear,
        ),
    ),
    _features(
        "ridge_hint",
        "Closed-form hint: the best linear map, solved for in the loss",
        "Golub, Pereyra, Inverse Problems 2003",
        _builders.over_pairs(
            "hint",
            losses.ridge_hint,
            _builders.constant({"hint": 1.0}),
            pairs=_views.deepest_pair,
        ),
        connector=False,
    ),
    _features(
        "vid",
        "Variational information distillation",
        "Ahn et al., 1904.05835, 2019",
        _build_vid,
    ),
    _features(
        "ickd",
        "Inter-channel correlation",
        "Liu et al., ICCV 2021",
        _builders.over_pairs(
            "ickd",
            _ickd,
            # torchdistill's 500 without its second division by the batch, of 256 examples.
            _builders.constant({"ickd": 500 / 256}),
            pairs=_views.deepest_pair,
            view=_views.matched_maps,
            connector=projection,
        ),
    ),
    _features(
        "pkd",
        "Pearson correlation of standardized features",
        "Cao et al., 2207.02039, 2022",
        _builders.over_pairs(
            "pkd",
            losses.pkd_pearson,
            _builders.constant({"pkd": 1.0}),
            connector=connectors.conv1x1,
        ),
    ),
    _features(
        "mgd",
        "Masked generative distillation",
        "Yang et al., 2205.01529, 2022",
        _build_mgd,
    ),
    _features(
        "srd",
        "The role of the projector: log-sum distance beside KD",
        "Miles, Mikolajczyk, 2303.11098, 2023",
        _build_srd,
        applies=_views.always,
    ),
)
