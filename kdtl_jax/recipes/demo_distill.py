"""Distillation on the UCI digits: one teacher per seed, a small student by every basic method.

The question is real because labels are scarce for the student: it sees ten images per class (100),
drawn anew for every seed, while its teacher was trained on all 899 training images. Student and
teacher read the *same* 100 images; nothing unlabelled is added. Every trained method chooses its
learning rate, and alpha where it has one, by mean validation accuracy. Run by `kdtl demo`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import losses, projection, transforms
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.datasets import Splits, per_class
from kdtl_jax.interop import linen
from kdtl_jax.models import mlp
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _fits
from kdtl_jax.recipes._fits import Fitted
from kdtl_jax.run import report

FAMILY = "distillation"
ORDER = (
    "teacher",
    "student_alone",
    "scaled_parameters",
    "scaled_homogeneous",
    "projected_outputs",
    "projected_outputs_learned",
    "kd",
    "kd_scaled",
)
TEMPERATURE, KD_WEIGHT, TASK_WEIGHT = 4.0, 0.9, 0.1
TEACHER_RATE = 3e-3
FEATURES = "hidden_1"  # the student's last hidden layer
LAYERS = ("dense_0/.*", "dense_1/.*", "head/.*")
Progress = Callable[[str], None]


class Settings(NamedTuple):
    """What fixes the experiment."""

    seeds: int = 10
    teacher_widths: tuple[int, ...] = (128, 64)
    student_widths: tuple[int, ...] = (16, 16)
    images_per_class: int = 10
    teacher_epochs: int = 20
    epochs: int = 100
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    alphas: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)


QUICK = Settings(seeds=2, teacher_epochs=2, epochs=10, rates=(1e-2,), alphas=(0.1, 1.0))


class Outcome(NamedTuple):
    """What the demo takes from here."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    alpha: dict[str, dict[str, Any]]
    teachers: Params  # stacked over seeds
    students: dict[str, Params]  # by method, stacked over seeds


class Bench(NamedTuple):
    """What every student is trained and measured on."""

    data: dict[str, Any]  # [seeds, images, ...], with the teacher's outputs
    validation: _fits.Held
    test: _fits.Held
    teacher_named: Array  # [seeds, test images], the classes the teachers name


class Recipe(NamedTuple):
    """A trained method: where it starts, what it minimizes, what it may choose."""

    method: str
    label: str
    start: Callable[[Mapping[str, float]], Params]  # setting -> parameters, stacked over seeds
    weights: Mapping[str, float]
    axes: Mapping[str, Sequence[float]]
    described: Mapping[str, Any]


def run(splits: Splits, settings: Settings, progress: Progress) -> Outcome:
    """Trains teachers and students, and compares them on the test split."""
    validation, test = _fits.held(splits.validation), _fits.held(splits.test)
    teacher = linen.model(mlp(settings.teacher_widths, 10))
    student = linen.model(mlp(settings.student_widths, 10))
    progress("teacher")
    teachers, teacher_row = _train_teachers(teacher, splits, settings, validation, test)

    seeds = range(settings.seeds)
    few = [per_class(splits.train, settings.images_per_class, seed=seed) for seed in seeds]
    data = _fits.stacked(few)
    apply_all = jax.jit(jax.vmap(lambda p, x: teacher.apply(p, None, x)[0]["logits"]))
    data["teacher"] = {"logits": apply_all(teachers.params, data["inputs"])}
    bench = Bench(data, validation, test, teachers.predictions)
    fresh = _fits.initial(student, settings.seeds, data["inputs"][0, :1])
    selected = select_weights(teachers.params, fresh)

    # One program serves every trained student: methods differ in their starts and weights alone.
    program = _fits.program(
        student.apply, lambda point: terms, ("task", "kd"), epochs=settings.epochs, batch_size=20
    )
    outcome = Outcome([teacher_row], {}, {}, teachers.params, {})
    for recipe in _recipes(settings, fresh, selected):
        progress(recipe.method)
        _train(recipe, program, bench, settings, outcome)
    progress("projected_outputs")
    outcome.rows.append(_project(student.apply, selected, bench, settings))
    progress("projected_outputs_learned")
    _learn_projection(student.apply, selected, fresh, bench, settings, outcome)
    outcome.rows.sort(key=lambda row: ORDER.index(row.method))
    return outcome


def terms(inputs: Inputs) -> dict[str, Array]:
    """Cross-entropy with the labels, and the exact KL to the teacher's cached outputs."""
    logits = inputs.student["logits"]
    return {
        "task": optax.softmax_cross_entropy_with_integer_labels(logits, inputs.batch["labels"]),
        "kd": losses.kd_kl(logits, inputs.batch["teacher"]["logits"], temperature=TEMPERATURE),
    }


def select_weights(teachers: Params, students: Params) -> Params:
    """Students filled with evenly spaced units of their teachers, layer by layer.

    A unit keeps its place on both sides: the rows that a layer reads are those that the layer
    before writes. Both trees are stacked over seeds.
    """
    return jax.vmap(
        lambda teacher, student: transforms.transfer(
            teacher, student, on_mismatch=transforms.select_uniform, check_finite=False
        )[0]
    )(teachers, students)


def _recipes(settings: Settings, fresh: Params, selected: Params) -> list[Recipe]:
    task, kd = {"task": 1.0, "kd": 0.0}, {"task": TASK_WEIGHT, "kd": KD_WEIGHT}
    fixed = {"epochs": settings.epochs, "batch_size": 20, "optimizer": "adam"}
    fixed_kd = {**fixed, "temperature": TEMPERATURE, **{f"weight_{k}": w for k, w in kd.items()}}
    alphas = {"alpha": settings.alphas}

    def anew(setting: Mapping[str, float]) -> Params:
        return fresh

    def scaled(setting: Mapping[str, float]) -> Params:
        return transforms.scale(selected, setting["alpha"])

    def homogeneous(setting: Mapping[str, float]) -> Params:
        return transforms.scale_homogeneous(selected, setting["alpha"], layers=LAYERS)

    return [
        Recipe("student_alone", "Student alone", anew, task, {}, fixed),
        Recipe(
            "scaled_parameters", "α × teacher's weights, fine-tuned", scaled, task, alphas, fixed
        ),
        Recipe(
            "scaled_homogeneous", "… biases scaled by α^layer", homogeneous, task, alphas, fixed
        ),
        Recipe("kd", "Distillation (KD)", anew, kd, {}, fixed_kd),
        Recipe("kd_scaled", "KD from α × teacher's weights", scaled, kd, alphas, fixed_kd),
    ]


def _train_teachers(
    teacher: linen.Linen,
    splits: Splits,
    settings: Settings,
    validation: _fits.Held,
    test: _fits.Held,
) -> tuple[Fitted, report.Row]:
    """One teacher per seed, on every training image."""
    images = jnp.asarray(splits.train.inputs)
    everything = {"inputs": images, "labels": jnp.asarray(splits.train.labels)}
    data = jax.tree.map(lambda x: jnp.stack([x] * settings.seeds), everything)
    starts = _fits.initial(teacher, settings.seeds, images[:1])
    program = _fits.program(
        teacher.apply,
        lambda point: lambda x: {"task": terms_of_labels(x)},
        ("task",),
        epochs=settings.teacher_epochs,
        batch_size=64,
        checks=2,
    )
    points, _ = _fits.points(
        lambda setting: starts, seeds=settings.seeds, weights={"task": 1.0}, rate=(TEACHER_RATE,)
    )
    fitted, seconds = _fits.timed(program, points, data, validation, test)
    described = {
        "widths": list(settings.teacher_widths),
        "images": len(images),
        "epochs": settings.teacher_epochs,
        "batch_size": 64,
        "optimizer": "adam",
        "rate": TEACHER_RATE,
    }
    return fitted, _fits.row("teacher", FAMILY, "Teacher", fitted, seconds, described)


def _train(
    recipe: Recipe,
    program: Callable[..., Fitted],
    bench: Bench,
    settings: Settings,
    outcome: Outcome,
) -> None:
    """Trains one method at every setting and adds what was chosen to the outcome."""
    points, columns = _fits.points(
        recipe.start,
        seeds=settings.seeds,
        weights=recipe.weights,
        rate=settings.rates,
        **recipe.axes,
    )
    fitted, seconds = _fits.timed(program, points, bench.data, bench.validation, bench.test)
    chosen = _fits.best(fitted, columns)
    picked = _fits.pick(fitted, chosen.rows)
    described = {**recipe.described, **chosen.setting}
    outcome.rows.append(
        _fits.row(
            recipe.method,
            FAMILY,
            recipe.label,
            picked,
            seconds,
            described,
            teacher=bench.teacher_named,
        )
    )
    outcome.learning[recipe.method] = _fits.learning_curve(picked, settings.epochs)
    outcome.students[recipe.method] = picked.params
    if "alpha" in recipe.axes:
        outcome.alpha[recipe.method] = _fits.setting_curve(fitted, columns, "alpha")


def _project(apply: ModelFn, selected: Params, bench: Bench, settings: Settings) -> report.Row:
    """`y_small = f(x) w`: f the teacher's selected hidden layers, w a ridge fit of its logits."""

    def fit(params: Params, data: Any, ridge: Array) -> Params:
        features = apply(params, None, data["inputs"])[0][FEATURES]
        w = projection.fit(features, data["teacher"]["logits"], ridge=ridge)
        return {**params, "head": {"kernel": w.kernel, "bias": w.bias}}

    def measure(params: Params, data: Any, ridge: Array) -> Fitted:
        params = fit(params, data, ridge)
        on_validation, _ = _fits.accuracy(apply, params, bench.validation)
        on_test, named = _fits.accuracy(apply, params, bench.test)
        return Fitted(params, on_validation[None], on_validation, on_test, named)

    over_seeds = jax.vmap(measure, in_axes=(0, 0, None))
    start = time.perf_counter()
    fitted = jax.block_until_ready(
        jax.jit(jax.vmap(over_seeds, in_axes=(None, None, 0)))(
            selected, bench.data, jnp.asarray(settings.ridges, jnp.float32)
        )
    )
    seconds = time.perf_counter() - start
    best = int(np.argmax(np.asarray(fitted.validation, np.float64).mean(axis=1)))
    picked = jax.tree.map(lambda leaf: leaf[best], fitted)
    described = {"gradient_steps": 0, "ridge": settings.ridges[best]}
    return _fits.row(
        "projected_outputs",
        FAMILY,
        "Projected outputs, ridge (no gradient step)",
        picked,
        seconds,
        described,
        teacher=bench.teacher_named,
    )


def _learn_projection(
    apply: ModelFn,
    selected: Params,
    fresh: Params,
    bench: Bench,
    settings: Settings,
    outcome: Outcome,
) -> None:
    """The same w learned by gradient on the same target; the hidden layers stay frozen."""
    start = {**selected, "head": fresh["head"]}

    def mse(inputs: Inputs) -> dict[str, Array]:
        target = inputs.batch["teacher"]["logits"]
        return {"mse": losses.mse(inputs.student["logits"], target)}

    recipe = Recipe(
        "projected_outputs_learned",
        "Projected outputs, learned",
        lambda setting: start,
        {"mse": 1.0},
        {},
        {"epochs": settings.epochs, "batch_size": 20, "optimizer": "adam", "trainable": "head"},
    )
    program = _fits.program(
        apply,
        lambda point: mse,
        ("mse",),
        epochs=settings.epochs,
        batch_size=20,
        trainable="head/.*",
    )
    _train(recipe, program, bench, settings, outcome)


def terms_of_labels(inputs: Inputs) -> Array:
    """Cross-entropy with the labels."""
    return optax.softmax_cross_entropy_with_integer_labels(
        inputs.student["logits"], inputs.batch["labels"]
    )
