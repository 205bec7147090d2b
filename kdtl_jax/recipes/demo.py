"""The four foundation methods and KD on the built-in UCI digits.

On two cores of a virtual AMD EPYC (jax 0.10.2): 42.1 s the first time, 19.9 s with its programs in
the compilation cache. Students have 1,482 parameters, their teacher 17,226; distillation takes 10
seeds, transfer 16.

Distillation: one teacher per seed is trained on all 899 images. Its small student gets ten per
class, drawn anew for every seed, and the teacher's outputs on those images; no unlabeled data is
used. Transfer: a model of the digits 0-4 passes its weights to a model of 5-9 with ten labels per
class. A perceptron learns centered digits from that many labels without help, so both tasks are
made harder in the same way: every digit is placed at random on a 12x12 canvas.

Every trained method chooses its learning rate, and alpha or strength where it has one, by mean
validation accuracy over seeds. The test split is used only for the final numbers.

    kdtl demo
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import losses, objective, projection, train, transforms, trees
from kdtl_jax._types import ModelFn, Params, Variables
from kdtl_jax.datasets import Splits, digits, only_classes, per_class, standardizer, stratified
from kdtl_jax.interop import model_files, networks
from kdtl_jax.models import mlp
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _choice, _models, _output, _students, _targets, _training, transfer
from kdtl_jax.recipes import _measures as measures
from kdtl_jax.recipes import _transfer_methods as transfer_methods
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._logs import LogSettings, write_curves
from kdtl_jax.recipes._progress import announce_parts
from kdtl_jax.recipes._stored_results import Store, load_or_run, open_store
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.recipes.settings import setting
from kdtl_jax.run import checkpoint, report, scores
from kdtl_jax.train import sweep

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
TEACHER, STUDENT, CLASSES = (128, 64), (16, 16), 10
IMAGES_PER_CLASS, BATCH = 10, 20
TEMPERATURE, KD, TASK = 4.0, 0.9, 0.1
FEATURES = "hidden_1"  # the student's last hidden layer
LAYERS = ("dense_0/.*", "dense_1/.*", "head/.*")
TARGETS = ("scratch", "copied_head_only", "copied_finetuned", "copied_l2_sp")
EXAMPLES = "  kdtl demo --out runs/demo"


@dataclass(frozen=True)
class Settings(LogSettings, types.Resumable):
    """Settings of `kdtl demo`."""

    out: str = setting("runs/demo", "the run folder", metavar="FOLDER")
    seeds: int = setting(
        10, "teachers, and students per setting", metavar="N", least=1, most=1000, quick=2
    )
    teacher_epochs: int = setting(20, "epochs per teacher", metavar="N", least=1, quick=2)
    epochs: int = setting(100, "epochs per student", metavar="N", least=1, quick=10)
    learning_rates: tuple[float, ...] = setting(
        (3e-3, 1e-2, 3e-2), "learning rates of the students to choose from", metavar="X,...",
        parse=types.positive_numbers, quick=(1e-2,), short="--lr",
    )  # fmt: skip
    alphas: tuple[float, ...] = setting(
        (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
        "students start from these multiples of the teacher's weights",
        metavar="X,...", parse=types.positive_numbers, quick=(0.1, 1.0),
    )  # fmt: skip
    ridges: tuple[float, ...] = setting(
        (1e-3, 1e-2, 1e-1, 1.0), "ridge strengths of the projected outputs", metavar="X,...",
        parse=types.positive_numbers,
    )  # fmt: skip
    target_seeds: int = setting(16, "targets per setting", metavar="N", least=1, most=1000, quick=2)
    target_epochs: int = setting(60, "epochs per target", metavar="N", least=1, quick=10)


def run(settings: Settings) -> None:
    """Trains teachers, students, sources and targets, and writes the run folder."""
    data = types.Data()  # the digits, split as every command splits them
    raw = stratified(digits(), validation=data.validation, test=data.test)
    scaling = standardizer(raw.train)
    splits = Splits(*(scaling.apply(part) for part in raw))
    with _output.open_run(settings, "demo", {"data": data.data}, saves=["checkpoints"]) as running:
        folder, run, bar, programs = running
        say = announce_parts(bar, len(ORDER) + 1 + len(TARGETS))
        store = open_store(folder, run, resume=settings.resume, kinds=(Fitted, Variables))
        targets = transfer_digits(splits, settings, say, store)
        rows, learning, alpha, models = distill(splits, settings, say, store)
        student_models = {name: Variables(x) for name, x in models.items() if name != "teacher"}
        students, rows = _students.select_best(rows, student_models)
        comparison = targets()
        bar.hide()
        order = sorted(rows, key=lambda row: ORDER.index(row.method))
        baselines = {FAMILY: "student_alone", _targets.FAMILY: _targets.BASELINE}
        results = report.Results(
            "kdtl demo: knowledge from a large model to a small one, from one task to another",
            {
                "name": raw.train.name,
                "license": "CC BY 4.0, https://doi.org/10.24432/C50P49",
                **{name: len(part.labels) for name, part in splits._asdict().items()},
                "student_images": CLASSES * IMAGES_PER_CLASS,
                "target_images": 50,
            },
            report.compared([*order, *comparison.rows], baselines),
            learning | comparison.learning,
            alpha,
            [
                f"Data: {raw.train.name}, {len(raw.train.labels)} training, "
                f"{len(raw.validation.labels)} validation and {len(raw.test.labels)} test images. "
                "Settings are chosen on the validation split, never on the test split.",
                "Distillation: a teacher sees all training images, its students only "
                f"{IMAGES_PER_CLASS} per class, drawn anew for every seed, and the teacher's "
                "outputs on those same images. Projected outputs keep the teacher's selected "
                "hidden layers and refit only the head.",
                "Transfer: digits 0–4 are the source, 5–9 the target with 10 labels per class, all "
                "at random places on a 12×12 canvas. (On centered digits, copying does not beat "
                "training from scratch.)",
                programs(),
                *_students.notes(rows, "student_alone"),
            ],
        )
        with checkpoint.open_folder(folder / "checkpoints") as checkpoints:
            checkpoint.save(checkpoints, settings.epochs, models, {"method": "all"})
        text, shape = f"mlp:{','.join(map(str, STUDENT))}", splits.train.inputs.shape[1:]
        metadata = model_files.About(text, CLASSES, scaling, (), shape)
        _students.write(folder, students, metadata, data)
        write_curves(folder, results.learning, settings.log)
        _output.finish(folder, results)


# Distillation.


def distill(
    splits: Splits, settings: Settings, say: Callable[[str], None], store: Store
) -> tuple[list[report.Row], dict[str, Any], dict[str, Any], dict[str, Params]]:
    """Rows, learning curves, alpha's curves, and models by method, stacked over seeds."""
    held_out = [_choice.on_device(part) for part in (splits.validation, splits.test)]
    everything, seeds = _choice.on_device(splits.train), settings.seeds
    example = everything["inputs"][:1]
    teacher, student = (
        networks.network(mlp(widths, CLASSES), example) for widths in (TEACHER, STUDENT)
    )
    say("teacher")
    teachers, seconds = load_or_run(
        store,
        "teacher",
        lambda: _targets.train_sources(
            teacher, everything, held_out, seeds=seeds, epochs=settings.teacher_epochs
        ),
    )
    fields = {
        "widths": list(TEACHER),
        "images": len(splits.train.labels),
        "epochs": settings.teacher_epochs,
        "batch_size": _targets.SOURCE_BATCH,
        "optimizer": "adam",
        "learning_rate": _targets.SOURCE_RATE,
    }
    frozen = teachers.variables.params
    rows = [
        measures.row(
            measures.CLASSES, "teacher", FAMILY, "Teacher", frozen, teachers, seconds, fields,
            targets=splits.test.labels,
        )
    ]  # fmt: skip

    # The students' data: ten images per class, and the teacher's outputs on them.
    parts = [per_class(splits.train, IMAGES_PER_CLASS, seed=seed) for seed in range(seeds)]
    data = _choice.stacked(parts)

    def teacher_outputs(params: Any, inputs: Any) -> dict[str, Any]:
        return {"logits": teacher.apply(params, None, inputs)[0]["logits"]}

    data["teacher"] = jax.jit(jax.vmap(teacher_outputs))(frozen, data["inputs"])

    # Their initial weights: new, or evenly spaced units of their teacher, layer by layer.
    initial = _choice.per_seed(
        lambda seed: student.init(_training.keys(seed).model, example).params, seeds
    )
    selected = jax.jit(jax.vmap(_models.select_units))(frozen, initial)

    learning: dict[str, Any] = {}
    alpha_curves: dict[str, Any] = {}
    models: dict[str, Params] = {"teacher": frozen}
    fixed = {"epochs": settings.epochs, "batch_size": BATCH, "optimizer": "adam"}

    def program(terms: Any, trainable: trees.Selector) -> Any:
        options = _training.FitOptions(
            settings.epochs, BATCH, _training.even_checks(settings.epochs), _training.variables
        )
        fit = _training.fit(make_learner(student.apply, terms, trainable), options)
        return sweep.vmap(fit, chunk=seeds * len(settings.learning_rates))

    def train_students(
        method: str,
        label: str,
        program: Any,
        start: Callable[[float], Params],
        weights: Mapping[str, float],
        fields: Mapping[str, Any],
        alphas: Sequence[float] = (1.0,),
    ) -> None:
        """Trains one method at every setting and adds the best setting to the results."""
        say(method)
        fixed_axes = {term: (weight,) for term, weight in weights.items()}
        points = _choice.columns(
            seeds, alpha=alphas, learning_rate=settings.learning_rates, **fixed_axes
        )
        stacks = [start(float(a)) for a in points["alpha"][::seeds]]  # one per setting
        start_column = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
        sweep_points = {**points, "start": start_column}
        fitted, seconds = load_or_run(
            store, method, lambda: program(sweep_points, {"data": data}, *held_out)
        )
        setting, best = _choice.best(fitted, points)
        axes = ("learning_rate", "alpha") if len(alphas) > 1 else ("learning_rate",)
        chosen = {axis: setting[axis] for axis in axes}
        models[method] = best.variables.params
        rows.append(
            measures.row(
                measures.CLASSES, method, FAMILY, label, models[method], best, seconds,
                {**fixed, **fields, **chosen},
                targets=splits.test.labels, teacher=teachers.answers,
            )
        )  # fmt: skip
        learning[method] = _choice.learning_curve(best, settings.epochs)
        if len(alphas) > 1:
            alpha_curves[method] = _choice.setting_curve(fitted, points, "alpha")

    # All students but one share a program: they differ only in initial weights and term weights.
    full, alone, both = program(kd_terms, trees.everything), (1.0, 0.0), (TASK, KD)
    distilled = {"temperature": TEMPERATURE, "weight_task": TASK, "weight_kd": KD}
    scaled = jax.jit(partial(transforms.scale, selected))
    homogeneous = jax.jit(partial(transforms.scale_homogeneous, selected, layers=LAYERS))
    for method, label, start, (task, kd), fields, alphas in (
        ("student_alone", "Student alone", lambda a: initial, alone, {}, (1.0,)),
        ("scaled_parameters", "α × teacher's weights, fine-tuned", scaled, alone, {}, None),
        ("scaled_homogeneous", "… biases scaled by α^layer", homogeneous, alone, {}, None),
        ("kd", "Distillation (KD)", lambda a: initial, both, distilled, (1.0,)),
        ("kd_scaled", "KD from α × teacher's weights", scaled, both, distilled, None),
    ):
        weights = {"task": task, "kd": kd}
        train_students(method, label, full, start, weights, fields, alphas or settings.alphas)
    say("projected_outputs")
    rows.append(
        project(student.apply, selected, data, held_out, teachers.answers, settings.ridges, store)
    )
    # The same projection learned by gradient on the same target; the hidden layers stay frozen.
    start = {**selected, "head": initial["head"]}
    train_students(
        "projected_outputs_learned", "Projected outputs, learned",
        program(regression_terms, "head/.*"), lambda a: start, {"mse": 1.0},
        {"trainable": "head"},
    )  # fmt: skip
    return rows, learning, alpha_curves, models


def make_learner(
    apply: ModelFn, terms: objective.TermsFn, trainable: trees.Selector = trees.everything
) -> Experiment:
    """A student; start, learning rate and term weights are the point's."""

    def start(point: Point, shared: Any) -> train.TrainState:
        tx = optax.adam(point["learning_rate"])
        key = _training.keys(point["seed"]).steps
        return train.init_state(point["start"], tx, key=key, trainable=trainable)

    def step(state: Any, batch: Any, point: Point, shared: Any) -> Any:
        tx = optax.adam(point["learning_rate"])
        weights = {term: point[term] for term in ("task", "kd", "mse") if term in point}
        return train.make_step(apply, terms, weights, tx, trainable=trainable)(state, batch)

    return Experiment(
        start,
        step,
        lambda state, inputs, shared: apply(state.params, None, inputs)[0]["logits"],
        lambda point, shared: _training.pick(shared["data"], point["seed"]),
    )


def kd_terms(inputs: Inputs) -> dict[str, Any]:
    """Cross-entropy with the labels, and the exact KL to the teacher's outputs."""
    logits, target = inputs.student["logits"], inputs.teacher["logits"]
    return {
        **objective.classification(inputs),
        "kd": losses.kd_kl(logits, target, temperature=TEMPERATURE),
    }


def regression_terms(inputs: Inputs) -> dict[str, Any]:
    """The squared distance from the teacher's logits."""
    return {"mse": losses.mse(inputs.student["logits"], inputs.teacher["logits"])}


def project(
    apply: ModelFn,
    selected: Params,
    data: Any,
    held_out: Sequence[Any],
    teacher_answers: Any,
    ridges: Sequence[float],
    store: Store,
) -> report.Row:
    """`y_small = f(x) w`: f, the teacher's selected hidden layers; w, a ridge fit of its logits."""

    def measure(params: Params, data: Any, ridge: Any) -> Fitted:
        features = apply(params, None, data["inputs"])[0][FEATURES]
        w = projection.fit(features, data["teacher"]["logits"], ridge=ridge)
        params = {**params, "head": {"kernel": w.kernel, "bias": w.bias}}
        logits = [apply(params, None, part["inputs"])[0]["logits"] for part in held_out]
        (_, validation_score), (answers, test_score) = (
            _training.judge_classes(x, part["labels"])
            for x, part in zip(logits, held_out, strict=True)
        )
        curve, losses = validation_score[None], jnp.zeros(1)
        return Fitted(Variables(params), curve, validation_score, test_score, answers, losses)

    over_seeds = jax.vmap(measure, in_axes=(0, 0, None))
    program = jax.jit(jax.vmap(over_seeds, in_axes=(None, None, 0)))
    strengths = np.asarray(ridges, np.float32)
    fitted, seconds = load_or_run(
        store, "projected_outputs", lambda: program(selected, data, strengths)
    )
    best = int(scores.ranked(np.asarray(fitted.validation).mean(axis=1))[0])
    fields = {"gradient_steps": 0, "ridge": ridges[best]}
    label = "Projected outputs, ridge (no gradient step)"
    chosen = _training.pick(fitted, best)
    return measures.row(
        measures.CLASSES, "projected_outputs", FAMILY, label, chosen.variables.params, chosen,
        seconds, fields, targets=held_out[1]["labels"], teacher=teacher_answers,
    )  # fmt: skip


# Transfer.


def transfer_digits(
    splits: Splits, settings: Settings, say: Callable[[str], None], store: Store
) -> Callable[[], _targets.Comparison]:
    """Starts training sources on 0-4; calling the result trains the targets on 5-9."""
    source_digits, target_digits = (
        Splits(*(only_classes(part, range(start, start + 5)) for part in splits))
        for start in (0, 5)
    )
    copies = 1 if settings.quick else 8
    source_part = transfer.on_canvas(source_digits.train, transfer.CANVAS, seed=0, copies=copies)
    target = Splits(
        *(transfer.on_canvas(x, transfer.CANVAS, seed=1 + i) for i, x in enumerate(target_digits))
    )
    net = networks.network(mlp(TEACHER, 5), jnp.asarray(target.train.inputs[:1]))
    sources = _targets.start_sources(
        net, source_part, seeds=settings.target_seeds, epochs=settings.teacher_epochs,
        store=store,
    )  # fmt: skip
    options = transfer.Settings(
        seeds=settings.target_seeds, epochs=settings.target_epochs, labels_per_class=10,
        learning_rates=(3e-3,) if settings.quick else (1e-3, 3e-3, 1e-2),
        strengths=(1e-2,) if settings.quick else None,
    )  # fmt: skip
    chosen = [transfer_methods.BY_NAME[name] for name in TARGETS]

    def targets() -> _targets.Comparison:
        say("source")
        surgery = _targets.Surgery()
        return _targets.compare(net, target, sources(), chosen, options, surgery, say, store)

    return targets
