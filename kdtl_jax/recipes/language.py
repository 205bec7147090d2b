"""Distills a language model into a smaller one, from weights and text to a report and a folder.

    kdtl language --teacher SmolLM2-135M/ --layers 0,3,6,9,12,15,18,21,24,29 --data text.txt \\
        --method sft,kd --steps 400

The teacher is a Hugging Face folder or a GGUF file, or is trained here from a shape. Students start
from a folder, from some of the teacher's layers, or from a random initialization. Every method
trains the same student on the same rows in the same order; all are compared on held-out text.
Without arguments this is a small example on bytes, on 390 kB of Shakespeare that the package holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from kdtl_jax import language, losses, train, trees
from kdtl_jax._types import Params
from kdtl_jax.recipes import _language_cache as of_cache
from kdtl_jax.recipes import _language_models as of_models
from kdtl_jax.recipes import _language_report as of_report
from kdtl_jax.recipes import _language_text as text_rows
from kdtl_jax.recipes import _language_training as training
from kdtl_jax.recipes import _output, _progress
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._training import warmed_up
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import sharding, teacher_cache

METHODS = {method.name: method for method in language.methods()}
DIVERGENCES = {
    "forward": losses.forward_kl,
    "reverse": losses.reverse_kl,
    "jsd": losses.jsd_normalized,
    "skew": losses.skew_forward_kl,
    "skew_reverse": losses.skew_reverse_kl,
    "tv": losses.total_variation,
}
EXAMPLES = """
  kdtl language
  kdtl language --teacher SmolLM2-135M/ --layers 0,4,8,12,16,20,24,29 --data text.txt
  kdtl language --teacher big/ --student small/ --data chat.jsonl --method opd --prompt 64
  kdtl language --teacher big/ --student big/ --method qad --bits 4 --data text.txt
  kdtl language --student base/ --method self --lora 16 --data answers.jsonl
  kdtl language --config runs/language/config.yaml --resume
"""


@dataclass(frozen=True)
class Settings(types.Output):
    """What fixes a run of `kdtl language`."""

    out: str = setting("runs/language", "the run folder", metavar="FOLDER")
    list: bool = setting(False, "print the table of methods and exit")
    method: tuple[str, ...] = setting(
        ("sft", "kd"), "what to compare; see --list", metavar="NAME,...", parse=types.method_names
    )
    data: tuple[str, ...] = setting(
        (), "files or folders: UTF-8 text, .jsonl or .parquet with text, messages, or prompt and "
        "completion (and privileged) in each record; default: 390 kB of Shakespeare",
        metavar="PATH", parse=text_rows.paths, many=True, group="data",
    )  # fmt: skip
    length: int = setting(128, "tokens per row", metavar="N", least=4, most=10**6, group="data")
    prompt: int = setting(
        32, "leading tokens of a row that are its prompt, for methods that sample", metavar="N",
        least=1, group="data",
    )  # fmt: skip
    held_out: float = setting(
        0.05, "share of the text held out for measuring", metavar="SHARE", above=0, below=1,
        group="data",
    )  # fmt: skip
    teacher: str | None = setting(
        None, "a Hugging Face folder or a .gguf file; default: one trained here", metavar="PATH",
        group="models",
    )  # fmt: skip
    teacher_shape: Mapping[str, int] | None = setting(
        None, "shape of a teacher trained here; default: layers=4,width=128,heads=4",
        metavar="NAME=N,...", parse=of_models.shaped, group="models",
    )  # fmt: skip
    student: str | None = setting(
        None, "a folder or file with the teacher's tokenizer", metavar="PATH", group="models"
    )
    layers: tuple[int, ...] = setting(
        (), "the teacher's layers that the student takes, from 0; default: every second one",
        metavar="N,...", parse=types.layer_numbers, group="models",
    )  # fmt: skip
    shape: Mapping[str, int] | None = setting(
        None, "a student with random weights: layers=2,width=64,heads=4[,key_heads=N][,hidden=N]",
        metavar="NAME=N,...", parse=of_models.shaped, group="models",
    )  # fmt: skip
    pruned: bool = setting(
        False, "start --shape as the teacher pruned to it: the layers, channels, heads and hidden "
        "units that matter most", group="models",
    )  # fmt: skip
    teacher_cache: str | None = setting(
        None, "keep the teacher's distributions on the rows in this folder, or read them from it; "
        "for kd and qad", metavar="FOLDER", group="models",
    )  # fmt: skip
    cached: str = setting(
        "top_k=64", "what --teacher-cache keeps: the N most likely tokens and the mass of the "
        "rest, N draws, or all", metavar="dense|top_k=N|draws=N", parse=of_cache.form,
        group="models",
    )  # fmt: skip
    lora: int | None = setting(
        None, "train a LoRA of this rank instead of all weights", metavar="RANK", least=1,
        most=10_000, group="models",
    )  # fmt: skip
    bits: int = setting(
        4, "bits per weight for qad, in groups of 32", metavar="N", least=2, most=8, group="models"
    )
    steps: int = setting(200, "steps per student", metavar="N", least=1, quick=4, group="training")
    teacher_steps: int = setting(
        600, "steps of a teacher trained here", metavar="N", least=1, quick=4, group="training"
    )
    batch_size: int = setting(8, "rows per step", metavar="N", least=1, group="training")
    microbatches: int = setting(
        1, "split each batch into this many parts to save memory", metavar="N", least=1,
        group="training",
    )  # fmt: skip
    learning_rate: float = types.positive_rate(
        1e-3, "AdamW's peak learning rate; it warms up, then decays to 0", short="--lr",
        group="training",
    )  # fmt: skip
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "compute in this precision; weights and losses stay in float32", group="training"
    )
    seed: int = setting(
        0, "seed of initial weights, order and samples", metavar="N", least=0, group="training"
    )
    divergence: Literal["forward", "reverse", "jsd", "skew", "skew_reverse", "tv"] | None = setting(
        None, "divergence to the teacher; default: the method's own", group="losses"
    )
    task: float = setting(
        0.0, "weight of the cross-entropy with the data, for kd, gkd and qad", metavar="X",
        least=0, group="losses",
    )  # fmt: skip
    on_policy: float = setting(
        0.5, "share of gkd's steps that use the student's samples", metavar="SHARE", least=0,
        most=1, group="losses",
    )  # fmt: skip
    temperature: float = types.positive_rate(1.0, "sampling temperature", group="losses")
    top_p: float | None = setting(
        None,
        "sample from the smallest set of tokens with this probability; default: all",
        metavar="P",
        above=0,
        most=1,
        group="losses",
    )
    start_steps: int = setting(
        0, "steps of kd before methods that sample, for students with random weights",
        metavar="N", least=0, group="training",
    )  # fmt: skip
    samples: int = setting(4, "held-out prompts to continue in the report", metavar="N", least=0)
    checks: int = setting(2, "measurements during training", metavar="N", least=1, quick=1)
    mesh: Mapping[str, int] = setting(
        {}, "data=4,fsdp=2: split batches over 8 devices, weights over 2 of them; tensor=2: the "
        "work of each layer over 2", metavar="AXIS=N,...",
        parse=partial(types.mesh_sizes, axes=("data", "fsdp", "tensor")), group="devices",
    )  # fmt: skip
    save_every: int | None = setting(
        None, "steps between saves; default: only at the end", metavar="N", least=1
    )
    resume: bool = setting(False, "continue the run in --out from its last save")


def run(settings: Settings) -> int:
    """Trains the teacher, if none is given, and its students; measures, reports and writes them.

    Raises:
      UsageError: if settings contradict each other, or tokenizers do.
      ValueError: for folders and files that cannot be read.
      SystemExit: after a signal, with everything saved.
    """
    if settings.list:
        rows = [(m.name, m.title, m.paper, "yes" if m.samples else "no") for m in METHODS.values()]
        return _output.list_methods(("method", "title", "paper", "samples"), rows)
    chosen = types.chosen(settings.method, METHODS, "kdtl language")
    if settings.prompt >= settings.length:
        raise UsageError(f"--prompt must be below --length {settings.length}.")
    if settings.batch_size % settings.microbatches:
        raise UsageError("--microbatches must divide --batch-size.")
    if sum((settings.student is not None, bool(settings.layers), settings.shape is not None)) > 1:
        raise UsageError("give one of --student, --layers and --shape.")
    if settings.pruned and settings.shape is None:
        raise UsageError("--pruned needs the --shape to prune to.")
    if settings.teacher_cache and not {m.name for m in chosen} & set(of_cache.METHODS):
        raise UsageError("--teacher-cache serves kd and qad: others ask about samples, or nothing.")
    mesh = sharding.make_mesh(**settings.mesh) if settings.mesh else None
    key_teacher, key_student, key_order, key_sample = jax.random.split(
        jax.random.key(settings.seed), 4
    )
    files = {n: v for n in ("teacher", "student") if (v := getattr(settings, n))}
    files |= {f"data {path}": path for path in settings.data}
    warms_up = settings.start_steps and any(method.samples for method in chosen)
    converted = [name for name in ("teacher", "student") if of_models.is_gguf(files.get(name, ""))]
    learners = [*([] if files.keys() & {"teacher", "student"} else ["teacher"]),
               *(["warm"] if warms_up else []), *(method.name for method in chosen)]  # fmt: skip
    folder_of_run = _output.run_folder(
        settings, "language", files, resume=settings.resume, models=[*learners, *converted],
        saves=[f"checkpoints/{name}" for name in learners],
    )  # fmt: skip
    with folder_of_run as (folder, who), _progress.shown() as say:
        # Text, by the teacher's tokenizer.
        folders = {
            name: of_models.as_folder(path, folder / name, resume=settings.resume)
            for name, path in (("teacher", settings.teacher), ("student", settings.student))
        }
        source = folders["teacher"] or folders["student"]
        tokenizer = language.byte_tokenizer() if source is None else language.tokenizer(source)
        if folders["teacher"] and folders["student"]:
            other = language.tokenizer(folders["student"])
            of_models.same_tokens(other.vocabulary, tokenizer.vocabulary)
        say("reading")
        shape = text_rows.Shape(settings.length, settings.prompt, settings.held_out)
        text = text_rows.read(settings.data, tokenizer, shape, folder / "text", who)
        if settings.batch_size > len(text.train.inputs["tokens"]):
            raise UsageError(
                f"--batch-size {settings.batch_size}: there are "
                f"{len(text.train.inputs['tokens'])} rows to learn from."
            )
        stops = () if tokenizer.eos is None else (tokenizer.eos,)
        common = training.Run(
            folder, who, settings.resume, mesh, settings.batch_size, settings.save_every,
            settings.checks, say,
        )  # fmt: skip
        dtype = jnp.bfloat16 if settings.precision == "bfloat16" else None
        measuring = partial(
            training.measuring, rows=text.held_out, text_bytes=text.held_out_bytes,
            batch_size=settings.batch_size, vocabulary=tokenizer.size, mesh=mesh,
        )  # fmt: skip
        curves: dict[str, Any] = {}

        def optimizer(steps: int) -> optax.GradientTransformation:
            return warmed_up(settings.learning_rate, steps, max(1, steps // 20))

        def teach(
            name: str, learner: language.Learner, tx: Any, params: Params, shared: Params,
            steps: int, measure: training.Measure, trainable: Any = trees.everything,
            cache: teacher_cache.Cache | None = None,
        ) -> training.Trained:  # fmt: skip
            nonlocal common
            moved = _progress.part(say, name, len(common.finished), len(learners))
            common = common._replace(moved=moved)
            state = train.init_state(params, tx, key=key_student, trainable=trainable)
            found = training.trained(
                name, learner, state, text.train, shared, steps, measure, common, key_order, cache
            )
            common = common._replace(finished=(*common.finished, name))
            curves[name] = found.curve
            return found

        # The teacher, and a student of a shape: what cannot be built is said before any training.
        taught_in, fresh = 0.0, None
        if settings.shape is not None and not settings.pruned:
            fresh = of_models.anew(settings.shape, tokenizer.size, tokenizer.eos, key_student)
        if source is None:
            sizes = settings.teacher_shape or {"layers": 4, "width": 128, "heads": 4}
            if max(settings.layers, default=0) >= sizes["layers"]:
                raise UsageError(
                    f"--layers {max(settings.layers)}: the teacher has {sizes['layers']} layers, "
                    f"0 to {sizes['layers'] - 1}."
                )
            teacher = of_models.anew(sizes, tokenizer.size, tokenizer.eos, key_teacher)
            if settings.pruned and settings.shape is not None:
                of_models.pruned(teacher, settings.shape, lambda _: None)
            own, tx = language.model(teacher.model), optimizer(settings.teacher_steps)
            measure = measuring(own, language.as_they_are, own, teacher.params)
            found = teach(
                "teacher", language.sft(language.Setup(teacher.model, tx)), tx, teacher.params,
                None, settings.teacher_steps, lambda params: measure(params, params),
            )  # fmt: skip
            teacher, taught_in = teacher._replace(params=found.params), found.seconds
        else:
            teacher = of_models.load(source)
            own = language.model(teacher.model)
            measure = measuring(own, language.as_they_are, own, teacher.params)
            curves["teacher"] = [training.as_line(0, measure(teacher.params))]
        # A student that cannot be had is said before the teacher answers all rows.
        placed = teacher._replace(params=training.place(teacher.params, mesh))
        start = of_models.beginning(
            placed, folder=folders["student"] if folders["teacher"] else None, fresh=fresh,
            layers=settings.layers, shape=settings.shape if settings.pruned else None, say=say,
            is_whole=settings.student is not None or settings.method == ("qad",),
        )  # fmt: skip
        cache = None
        if settings.teacher_cache:
            cache = of_cache.written(
                settings.teacher_cache, teacher, tokenizer, text.train, form=settings.cached,
                batch_size=settings.batch_size, seed=settings.seed, say=say,
            )  # fmt: skip
        teacher = placed
        rows_of_tables = {x.model.config.vocabulary for x in (teacher, start)}
        vocabulary = tokenizer.size if len(rows_of_tables) > 1 else None
        built: dict[str, tuple[of_models.Student, training.Trained]] = {}
        warm: Params = None
        for method in chosen:
            name = method.name
            quantize = of_models.rounding(settings.bits) if name == "qad" else None
            student = of_models.student(
                start, dtype=dtype, lora=settings.lora, quantize=quantize, key=key_student
            )
            setup = language.Setup(
                student.decoder,
                optimizer(settings.steps),
                teacher=teacher.model,
                weights=student.weights,
                trainable=student.trainable,
                prompt=settings.prompt,
                divergence=DIVERGENCES[settings.divergence] if settings.divergence else None,
                vocabulary=vocabulary,
                task=settings.task,
                share=settings.on_policy,
                temperature=settings.temperature,
                top_p=settings.top_p,
                stop_tokens=stops,
                microbatches=settings.microbatches,
            )
            model = language.model(student.decoder)
            measure = measuring(model, student.weights, own, teacher.params)
            if not built:
                curves["start"] = [training.as_line(0, measure(student.start))]
            params, shared = student.start, teacher.params
            if method.samples and settings.start_steps:
                if warm is None:
                    tx = optimizer(settings.start_steps)
                    learner = language.kd(setup._replace(tx=tx))
                    steps = settings.start_steps
                    warm = teach(
                        "warm", learner, tx, params, shared, steps, measure, student.trainable
                    ).params
                params = warm
            if method.teaches_itself:
                itself = jax.jit(student.weights)(params)
                shared = None if name == "self_ema" else training.place(itself, mesh)
            is_cached = cache is not None and name in of_cache.METHODS
            if is_cached:  # the cache has the tokenizer's ids alone, whatever the tables have
                learner = language.kd_stored(setup._replace(vocabulary=tokenizer.size))
            else:
                learner = method.build(setup)
            found = teach(
                name, learner, setup.tx, params, None if is_cached else shared, settings.steps,
                measure, student.trainable, cache if is_cached else None,
            )  # fmt: skip
            built[name] = student, found

        # How they compare; students of one shape share their programs.
        say.hide()
        say("measuring")
        first = next(iter(built.values()))[0]
        compared = [("teacher", "Teacher", teacher.model, teacher.params, taught_in)]
        compared.append(
            ("start", "Student before training", first.decoder, first.weights(first.start), 0.0)
        )
        for name, (student, found) in built.items():
            whole = jax.jit(student.weights)(found.params)
            compared.append((name, METHODS[name].title, student.decoder, whole, found.seconds))
            of_models.write_folder(folder / name, whole, start, source)
        if source is None:
            of_models.write_folder(folder / "teacher", teacher.params, teacher, None)
        table, said, programs = [], {}, {}
        for name, title, decoder, params, seconds in compared:
            if decoder.config not in programs:
                draw = training.continuing(
                    decoder, text.held_out, settings.samples, prompt=settings.prompt,
                    length=min(settings.length - settings.prompt, 64), key=key_sample,
                    temperature=0.8, stop_tokens=stops,
                )  # fmt: skip
                model = language.model(decoder)
                rate = training.speed(model, params, text.held_out, settings.batch_size)
                programs[decoder.config] = draw, rate
            draw, rate = programs[decoder.config]
            last = {k.removeprefix("eval/"): v for k, v in curves[name][-1].items()}
            about = {"steps": last.pop("step")} if seconds else {}
            size = trees.count(params), sum(x.nbytes for x in jax.tree.leaves(params))
            table.append(of_report.Row(name, title, last, *size, rate, seconds, about))
            if settings.samples:
                said[title] = draw(params)
        sides = []
        for i in range(min(settings.samples, len(text.held_out.inputs["tokens"]))):
            prompt = text.held_out.inputs["tokens"][i, : settings.prompt]
            real = text.held_out.inputs["segments"][i, : settings.prompt] > 0
            each = {title: tokenizer.decode(rows[i]) for title, rows in said.items()}
            sides.append(of_report.Sample(tokenizer.decode(prompt[real].tolist()), each))
        cut, notes = text.train.cut + text.held_out.cut, []
        if cut:
            notes.append(f"{cut} records were longer than their columns and were cut short.")
        about = {
            "name": text.name,
            "rows": len(text.train.inputs["tokens"]),
            "held_out_rows": len(text.held_out.inputs["tokens"]),
            "held_out_bytes": text.held_out_bytes,
        }
        title = "kdtl language: a language model and its students"
        of_report.write(folder, title, about, table, curves, sides, notes)
        print(f"students: {', '.join(str(folder / name) for name in built)}")
    return 0
