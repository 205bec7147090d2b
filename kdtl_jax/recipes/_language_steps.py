"""The steps of `kdtl language` in order: teacher, start, students, comparison.

Each takes the shared `LanguageRun` and the results of the steps before it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdtl_jax import language, losses, train, trees
from kdtl_jax._types import Params
from kdtl_jax.interop import decoders
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.recipes import _language_models as language_models
from kdtl_jax.recipes import _language_report as language_report
from kdtl_jax.recipes import _language_text as text_rows
from kdtl_jax.recipes import _language_training as training
from kdtl_jax.recipes._language_training import LanguageRun
from kdtl_jax.recipes._training import warmup_adamw
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import loop, teacher_cache

DIVERGENCES = {
    "forward": losses.forward_kl,
    "reverse": losses.reverse_kl,
    "jsd": losses.jsd_normalized,
    "skew": losses.skew_forward_kl,
    "skew_reverse": losses.skew_reverse_kl,
    "tv": losses.total_variation,
}
SHAPE = {"layers": 4, "width": 128, "heads": 4}  # of a teacher trained here


class Teacher(NamedTuple):
    """The teacher, before and after placing it on the mesh, and its seconds of training."""

    host: PretrainedDecoder
    placed: PretrainedDecoder
    seconds: float


class TrainedStudent(NamedTuple):
    """A student and its training."""

    method: language.LanguageMethod
    student: language_models.LanguageStudent
    trained: training.LanguageResult
    diverged: str  # how, or nothing


# The teacher, and the initial student.


def new_student(run: LanguageRun) -> PretrainedDecoder | None:
    """A student of `--shape`; built first, so that an impossible shape fails at once."""
    settings, tokenizer = run.settings, run.tokenizer
    if settings.shape is None or settings.pruned:
        return None
    return language_models.initialize(
        settings.shape, tokenizer.size, tokenizer.eos, run.keys.student
    )


def make_teacher(run: LanguageRun) -> Teacher:
    """Loads the teacher, or trains one."""
    if run.source is not None:
        model = language_models.load(run.source)
        _check_fits(run, model, "the teacher")
        network = language.model(model.model)
        measured = training.make_measure(run, network, language.as_they_are, model)(model.params)
        if not math.isfinite(measured["bits_per_byte"]):
            raise UsageError(
                f"--{'teacher' if run.teacher else 'student'} {run.source}: the model gives the "
                f"held-out text {measured['bits_per_byte']} bits per byte. Its weights hold NaN or "
                "infinity, or overflow."
            )
        run.curves["teacher"] = [training.curve_line(0, measured)]
        return Teacher(model, _place(run, model), 0.0)
    settings, tokenizer = run.settings, run.tokenizer
    sizes = settings.teacher_shape or SHAPE
    if max(settings.layers, default=0) >= sizes["layers"]:
        raise UsageError(
            f"--layers {max(settings.layers)}: the teacher has {sizes['layers']} layers, "
            f"0 to {sizes['layers'] - 1}."
        )
    model = language_models.initialize(sizes, tokenizer.size, tokenizer.eos, run.keys.teacher)
    if settings.pruned and settings.shape is not None:  # fail before training if it cannot be
        language_models.prune(model, settings.shape, lambda _: None)
    network = language.model(model.model)
    measure = training.make_measure(run, network, language.as_they_are, model)
    tx = _optimizer(run, settings.teacher_steps)
    state = train.init_state(model.params, tx, key=run.keys.student)
    trained = training.train_model(
        "teacher", language.sft(language.Setup(model.model, tx)), state, run, None,
        settings.teacher_steps, lambda params: measure(params, params),
    )  # fmt: skip
    model = model._replace(params=trained.params)
    return Teacher(model, _place(run, model), trained.seconds)


def make_start(
    run: LanguageRun, teacher: Teacher, fresh: PretrainedDecoder | None
) -> PretrainedDecoder:
    """The student that every method starts from: from a folder, new, or part of the teacher.

    Called before the teacher runs on all rows.
    """
    settings, teacher_model = run.settings, teacher.placed
    if run.teacher and run.student:
        model = language_models.load(run.student)
    elif fresh is not None:
        model = fresh
    elif settings.pruned:
        text = text_rows.pieces(run.text.train)
        model = language_models.prune(teacher_model, settings.shape, run.say, text)
    elif settings.layers:
        model = decoders.student(teacher_model, layers=settings.layers)
    elif settings.student is not None or settings.method == ("qad",):
        model = teacher_model
    else:
        model = decoders.student(
            teacher_model, layers=range(0, teacher_model.model.config.layers, 2)
        )
    _check_fits(run, model, "the student")
    return model


def open_cache(run: LanguageRun, teacher: Teacher) -> teacher_cache.Cache | None:
    """The cache of the teacher's distributions on the rows, or None if none was requested."""
    settings = run.settings
    if not settings.teacher_cache:
        return None
    return training.write_cache(
        settings.teacher_cache, teacher.host, run.tokenizer, run.text.train,
        form=settings.cached, batch_size=settings.batch_size, seed=settings.seed, say=run.say,
    )  # fmt: skip


# The students.


def train_students(
    run: LanguageRun,
    chosen: Sequence[language.LanguageMethod],
    teacher: Teacher,
    start: PretrainedDecoder,
    cache: teacher_cache.Cache | None,
) -> list[TrainedStudent]:
    """Trains a student per method, all from one start on the same rows in the same order."""
    trained_students: list[TrainedStudent] = []
    warm_start: Params = None
    for method in chosen:
        student, setup = _student(run, method, teacher, start)
        network, trainable = language.model(student.decoder), student.trainable
        measure = training.make_measure(run, network, student.weights, teacher.placed)
        if not trained_students:
            run.curves["start"] = [training.curve_line(0, measure(student.start))]
        params, teacher_params = student.start, teacher.placed.params
        if method.samples and run.settings.start_steps:
            if warm_start is None:  # some steps of kd on the data
                steps = run.settings.start_steps
                tx = _optimizer(run, steps)
                state = train.init_state(params, tx, key=run.keys.student, trainable=trainable)
                warm_start = training.train_model(
                    "warm", language.kd(setup._replace(tx=tx)), state, run, teacher_params, steps,
                    measure,
                ).params  # fmt: skip
            params = warm_start
        if method.teaches_itself:
            own_params = jax.jit(student.weights)(params)
            teacher_params = (
                None if method.name == "self_ema" else training.place(own_params, run.mesh)
            )
        method_cache = cache if method.name in training.CACHED else None
        if method_cache is None:
            learner = method.build(setup)
        else:  # the cache has only the tokenizer's ids, even if the embeddings have more
            learner = language.kd_stored(setup._replace(vocabulary=run.tokenizer.size))
            teacher_params = None
        nonfinite: list[loop.Nonfinite] = []  # if one diverges, the others' results are kept
        state = train.init_state(params, setup.tx, key=run.keys.student, trainable=trainable)
        trained = training.train_model(
            method.name, learner, state, run, teacher_params, run.settings.steps, measure,
            method_cache, on_nonfinite=nonfinite.append,
        )  # fmt: skip
        trained_students.append(
            TrainedStudent(method, student, trained, str(nonfinite[0]) if nonfinite else "")
        )
    return trained_students


def _student(
    run: LanguageRun, method: language.LanguageMethod, teacher: Teacher, start: PretrainedDecoder
) -> tuple[language_models.LanguageStudent, language.Setup]:
    """A method's student, and the setup that builds its step."""
    settings, tokenizer = run.settings, run.tokenizer
    student = language_models.make_student(
        start,
        dtype=jnp.bfloat16 if settings.precision == "bfloat16" else None,
        lora=settings.lora,
        quantize=language_models.int_rounding(settings.bits) if method.name == "qad" else None,
        key=run.keys.student,
    )
    table_sizes = {x.model.config.vocabulary for x in (teacher.placed, start)}
    setup = language.Setup(
        student.decoder,
        _optimizer(run, settings.steps),
        teacher=teacher.placed.model,
        weights=student.weights,
        trainable=student.trainable,
        prompt=settings.prompt,
        divergence=DIVERGENCES[settings.divergence] if settings.divergence else None,
        vocabulary=tokenizer.size if len(table_sizes) > 1 else None,
        task=settings.task,
        share=settings.on_policy,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_tokens=run.stop_tokens,
        microbatches=settings.microbatches,
    )
    return student, setup


# How they compare.


def compare(
    run: LanguageRun,
    teacher: Teacher,
    start: PretrainedDecoder,
    trained_students: Sequence[TrainedStudent],
) -> tuple[list[language_report.LanguageRow], list[language_report.Sample]]:
    """The report's rows and samples; writes the folders of the trained models.

    Models of one shape share their programs.
    """
    settings, first, held_out = run.settings, trained_students[0].student, run.text.held_out
    models = [
        ("teacher", "Teacher", teacher.placed.model, teacher.placed.params, teacher.seconds),
        ("start", "Student before training", first.decoder, first.weights(first.start), 0.0),
    ]
    for method, student, trained, _ in trained_students:
        merged = jax.jit(student.weights)(trained.params)
        models.append((method.name, method.title, student.decoder, merged, trained.seconds))
        language_models.write_folder(run.folder / method.name, merged, start, run.source)
    if run.source is None:
        language_models.write_folder(
            run.folder / "teacher", teacher.placed.params, teacher.placed, None
        )
    rows, continuations, programs = [], {}, {}
    diverged = {
        result.method.name: result.diverged for result in trained_students if result.diverged
    }
    for name, title, decoder, params, seconds in models:
        if decoder.config not in programs:
            draw = training.make_sampler(run, decoder)
            rate = training.speed(language.model(decoder), params, held_out, settings.batch_size)
            programs[decoder.config] = draw, rate
        draw, rate = programs[decoder.config]
        last = {k.removeprefix("eval/"): v for k, v in run.curves[name][-1].items()}
        fields: dict[str, Any] = {"steps": last.pop("step")} if seconds else {}
        if name in diverged:
            fields["diverged"] = diverged[name]
            title += " (diverged)"
        size = trees.count(params), sum(x.nbytes for x in jax.tree.leaves(params))
        rows.append(language_report.LanguageRow(name, title, last, *size, rate, seconds, fields))
        if settings.samples:
            continuations[title] = draw(params)
    return rows, _samples(run, continuations)


def _samples(
    run: LanguageRun, continuations: dict[str, list[list[int]]]
) -> list[language_report.Sample]:
    """Held-out prompts, with each model's continuation."""
    settings, samples = run.settings, []
    prompts = training.prompts(run.text.held_out, settings.samples, settings.prompt)
    for i, (prompt, real) in enumerate(zip(*prompts, strict=True)):
        texts = {title: run.tokenizer.decode(rows[i]) for title, rows in continuations.items()}
        samples.append(language_report.Sample(run.tokenizer.decode(prompt[real].tolist()), texts))
    return samples


# What the steps share.


def _optimizer(run: LanguageRun, steps: int) -> optax.GradientTransformation:
    return warmup_adamw(run.settings.learning_rate, steps, max(1, steps // 20))


def add_note(run: LanguageRun, text: str) -> None:
    """Prints a note at once and adds it to the report."""
    if text not in run.notes:
        run.notes.append(text)
        run.say(f"note: {text}")


def _check_fits(run: LanguageRun, model: PretrainedDecoder, role: str) -> None:
    length = run.settings.length
    language_models.check_fits(model.model.config, run.tokenizer.size, length, role)
    if length > (trained_length := language_models.trained_length(model.config)):
        add_note(
            run,
            f"{role} was made for {trained_length:,} positions (its config.json), but rows have "
            f"{length:,}.",
        )


def _place(run: LanguageRun, model: PretrainedDecoder) -> PretrainedDecoder:
    return model._replace(params=training.place(model.params, run.mesh))
