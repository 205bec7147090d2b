"""The steps of `kdtl language` in order: teacher, start, students, comparison.

Each takes the shared `Work` and the results of the steps before it.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import language, losses, train, trees
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.interop import decoders
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.recipes import _language_models as of_models
from kdtl_jax.recipes import _language_report as of_report
from kdtl_jax.recipes import _language_text as text_rows
from kdtl_jax.recipes import _language_training as training
from kdtl_jax.recipes import _logs, _progress
from kdtl_jax.recipes._training import warmed_up
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


class Keys(NamedTuple):
    """The independent sources of randomness in a run."""

    teacher: Array
    student: Array
    order: Array
    sample: Array


class Work(NamedTuple):
    """What all steps of a run share."""

    settings: Any  # `language.Settings`
    folder: Path
    teacher: str | None  # folders of given models
    student: str | None
    tokenizer: language.Tokenizer
    text: text_rows.Text
    run: training.Run
    learners: Sequence[str]  # all that is trained, in order
    say: _progress.Progress
    keys: Keys
    curves: dict[str, list[dict[str, float]]]  # measurements of each model, as they are made
    notes: list[str]  # additional notes of the report, as they arise

    @property
    def source(self) -> str | None:
        """The folder that the tokenizer comes from."""
        return self.teacher or self.student


class Taught(NamedTuple):
    """The teacher, its parameters placed on the mesh, and how long it was trained."""

    given: PretrainedDecoder  # as read or trained
    placed: PretrainedDecoder
    seconds: float


class Built(NamedTuple):
    """A student and its training."""

    method: language.LanguageMethod
    student: of_models.Student
    trained: training.Trained
    diverged: str  # how, or nothing


# The teacher, and what students start from.


def fresh(work: Work) -> PretrainedDecoder | None:
    """A student of `--shape`; built first, so that an impossible one fails at once."""
    settings, tokenizer = work.settings, work.tokenizer
    if settings.shape is None or settings.pruned:
        return None
    return of_models.anew(settings.shape, tokenizer.size, tokenizer.eos, work.keys.student)


def teacher(work: Work) -> Taught:
    """The teacher of a folder, or one that is trained here."""
    if work.source is not None:
        found = of_models.load(work.source)
        _fits(work, found, "the teacher")
        measure = _measuring(work, language.model(found.model), language.as_they_are, found)
        measured = measure(found.params)
        if not math.isfinite(measured["bits_per_byte"]):
            raise UsageError(
                f"--{'teacher' if work.teacher else 'student'} {work.source}: the model gives the "
                f"held-out text {measured['bits_per_byte']} bits per byte. Its weights hold NaN or "
                "infinity, or overflow."
            )
        work.curves["teacher"] = [training.as_line(0, measured)]
        return Taught(found, _placed(work, found), 0.0)
    settings, tokenizer = work.settings, work.tokenizer
    sizes = settings.teacher_shape or SHAPE
    if max(settings.layers, default=0) >= sizes["layers"]:
        raise UsageError(
            f"--layers {max(settings.layers)}: the teacher has {sizes['layers']} layers, "
            f"0 to {sizes['layers'] - 1}."
        )
    found = of_models.anew(sizes, tokenizer.size, tokenizer.eos, work.keys.teacher)
    if settings.pruned and settings.shape is not None:  # check that it can be, before it is trained
        of_models.pruned(found, settings.shape, lambda _: None)
    measure = _measuring(work, language.model(found.model), language.as_they_are, found)
    tx = _optimizer(work, settings.teacher_steps)
    trained = _teach(
        work, "teacher", language.sft(language.Setup(found.model, tx)), tx, found.params, None,
        settings.teacher_steps, lambda params: measure(params, params),
    )  # fmt: skip
    found = found._replace(params=trained.params)
    return Taught(found, _placed(work, found), trained.seconds)


def start(work: Work, taught: Taught, fresh: PretrainedDecoder | None) -> PretrainedDecoder:
    """The student before any method: from a folder, new, or part of the teacher.

    It is made before the teacher runs on all rows.
    """
    settings, source = work.settings, taught.placed
    if work.teacher and work.student:
        found = of_models.load(work.student)
    elif fresh is not None:
        found = fresh
    elif settings.pruned:
        text = text_rows.pieces(work.text.train)
        found = of_models.pruned(source, settings.shape, work.say, text)
    elif settings.layers:
        found = decoders.student(source, layers=settings.layers)
    elif settings.student is not None or settings.method == ("qad",):
        found = source
    else:
        found = decoders.student(source, layers=range(0, source.model.config.layers, 2))
    _fits(work, found, "the student")
    return found


def cache(work: Work, taught: Taught) -> teacher_cache.Cache | None:
    """The teacher's distributions on the rows, if they are to be stored."""
    settings = work.settings
    if not settings.teacher_cache:
        return None
    return training.written_cache(
        settings.teacher_cache, taught.given, work.tokenizer, work.text.train,
        form=settings.cached, batch_size=settings.batch_size, seed=settings.seed, say=work.say,
    )  # fmt: skip


# The students.


def students(
    work: Work,
    chosen: Sequence[language.LanguageMethod],
    taught: Taught,
    start: PretrainedDecoder,
    cache: teacher_cache.Cache | None,
) -> list[Built]:
    """A student per method, all from one start on the same rows in the same order."""
    built: list[Built] = []
    warm: Params = None
    for method in chosen:
        student, setup = _student(work, method, taught, start)
        measure = _measuring(work, language.model(student.decoder), student.weights, taught.placed)
        if not built:
            work.curves["start"] = [training.as_line(0, measure(student.start))]
        begin, shared = student.start, taught.placed.params
        if method.samples and work.settings.start_steps:
            if warm is None:  # some steps of kd on the data
                steps = work.settings.start_steps
                tx = _optimizer(work, steps)
                warm = _teach(
                    work, "warm", language.kd(setup._replace(tx=tx)), tx, begin, shared, steps,
                    measure, student.trainable,
                ).params  # fmt: skip
            begin = warm
        if method.teaches_itself:
            itself = jax.jit(student.weights)(begin)
            shared = None if method.name == "self_ema" else training.place(itself, work.run.mesh)
        kept = cache if method.name in training.CACHED else None
        if kept is None:
            learner = method.build(setup)
        else:  # the cache has only the tokenizer's ids, whatever the tables have
            learner = language.kd_stored(setup._replace(vocabulary=work.tokenizer.size))
            shared = None
        met: list[loop.Nonfinite] = []  # if one diverges, the others' results are kept
        trained = _teach(
            work, method.name, learner, setup.tx, begin, shared, work.settings.steps, measure,
            student.trainable, kept, on_nonfinite=met.append,
        )  # fmt: skip
        built.append(Built(method, student, trained, str(met[0]) if met else ""))
    return built


def _student(
    work: Work, method: language.LanguageMethod, taught: Taught, start: PretrainedDecoder
) -> tuple[of_models.Student, language.Setup]:
    """A method's student, and what builds its step."""
    settings, tokenizer = work.settings, work.tokenizer
    student = of_models.student(
        start,
        dtype=jnp.bfloat16 if settings.precision == "bfloat16" else None,
        lora=settings.lora,
        quantize=of_models.rounding(settings.bits) if method.name == "qad" else None,
        key=work.keys.student,
    )
    rows_of_tables = {x.model.config.vocabulary for x in (taught.placed, start)}
    setup = language.Setup(
        student.decoder,
        _optimizer(work, settings.steps),
        teacher=taught.placed.model,
        weights=student.weights,
        trainable=student.trainable,
        prompt=settings.prompt,
        divergence=DIVERGENCES[settings.divergence] if settings.divergence else None,
        vocabulary=tokenizer.size if len(rows_of_tables) > 1 else None,
        task=settings.task,
        share=settings.on_policy,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_tokens=_stops(work),
        microbatches=settings.microbatches,
    )
    return student, setup


# How they compare.


def compared(
    work: Work, taught: Taught, start: PretrainedDecoder, built: Sequence[Built]
) -> tuple[list[of_report.Row], list[of_report.Sample]]:
    """Rows of the report and continued prompts; writes the folders of the trained models.

    Models of one shape share their programs.
    """
    settings, first, held_out = work.settings, built[0].student, work.text.held_out
    models = [
        ("teacher", "Teacher", taught.placed.model, taught.placed.params, taught.seconds),
        ("start", "Student before training", first.decoder, first.weights(first.start), 0.0),
    ]
    for method, student, trained, _ in built:
        whole = jax.jit(student.weights)(trained.params)
        models.append((method.name, method.title, student.decoder, whole, trained.seconds))
        of_models.write_folder(work.folder / method.name, whole, start, work.source)
    if work.source is None:
        of_models.write_folder(work.folder / "teacher", taught.placed.params, taught.placed, None)
    rows, said, programs = [], {}, {}
    diverged = {each.method.name: each.diverged for each in built if each.diverged}
    for name, title, decoder, params, seconds in models:
        if decoder.config not in programs:
            draw = training.continuing(
                decoder, held_out, settings.samples, prompt=settings.prompt,
                length=min(settings.length - settings.prompt, 64), key=work.keys.sample,
                stop_tokens=_stops(work),
            )  # fmt: skip
            rate = training.speed(language.model(decoder), params, held_out, settings.batch_size)
            programs[decoder.config] = draw, rate
        draw, rate = programs[decoder.config]
        last = {k.removeprefix("eval/"): v for k, v in work.curves[name][-1].items()}
        about: dict[str, Any] = {"steps": last.pop("step")} if seconds else {}
        if name in diverged:
            about["diverged"] = diverged[name]
            title += " (diverged)"
        size = trees.count(params), sum(x.nbytes for x in jax.tree.leaves(params))
        rows.append(of_report.Row(name, title, last, *size, rate, seconds, about))
        if settings.samples:
            said[title] = draw(params)
    return rows, _samples(work, said)


def _samples(work: Work, said: dict[str, list[list[int]]]) -> list[of_report.Sample]:
    """Held-out prompts, with each model's continuation."""
    settings, found = work.settings, []
    shown = training.prompts(work.text.held_out, settings.samples, settings.prompt)
    for i, (prompt, real) in enumerate(zip(*shown, strict=True)):
        each = {title: work.tokenizer.decode(rows[i]) for title, rows in said.items()}
        found.append(of_report.Sample(work.tokenizer.decode(prompt[real].tolist()), each))
    return found


# What the steps share.


def _optimizer(work: Work, steps: int) -> optax.GradientTransformation:
    return warmed_up(work.settings.learning_rate, steps, max(1, steps // 20))


def _stops(work: Work) -> tuple[int, ...]:
    return () if work.tokenizer.eos is None else (work.tokenizer.eos,)


def note(work: Work, text: str) -> None:
    """Prints a note at once and adds it to the report."""
    if text not in work.notes:
        work.notes.append(text)
        work.say(f"note: {text}")


def _fits(work: Work, found: PretrainedDecoder, who: str) -> None:
    length = work.settings.length
    of_models.fits(found.model.config, work.tokenizer.size, length, who)
    if length > (known := of_models.known_positions(found.config)):
        note(
            work,
            f"{who} was made for {known:,} positions (its config.json), but rows have {length:,}.",
        )


def _placed(work: Work, found: PretrainedDecoder) -> PretrainedDecoder:
    return found._replace(params=training.place(found.params, work.run.mesh))


def _measuring(work: Work, model: ModelFn, weights: Any, taught: PretrainedDecoder) -> Any:
    return training.measuring(
        model, weights, language.model(taught.model), taught.params,
        rows=work.text.held_out, text_bytes=work.text.held_out_bytes,
        batch_size=work.settings.batch_size, vocabulary=work.tokenizer.size, mesh=work.run.mesh,
    )  # fmt: skip


def _teach(
    work: Work,
    name: str,
    learner: language.Learner,
    tx: optax.GradientTransformation,
    params: Params,
    shared: Params,
    steps: int,
    measure: training.Measure,
    trainable: trees.Selector = trees.everything,
    cache: teacher_cache.Cache | None = None,
    on_nonfinite: Callable[[loop.Nonfinite], None] = loop.raise_nonfinite,
) -> training.Trained:
    """One model's training; its curve joins the others."""
    moved = _progress.part(work.say, name, len(work.curves), len(work.learners))
    run = work.run._replace(moved=moved)
    state = train.init_state(params, tx, key=work.keys.student, trainable=trainable)
    found = training.trained(
        name, learner, state, work.text.train, shared, steps, measure, run, work.keys.order,
        cache, on_nonfinite=on_nonfinite,
    )  # fmt: skip
    work.curves[name] = found.curve
    _logs.show(work.run.folder, work.run.lines.get(name, []), work.settings.log)
    return found
