"""Distills a language model into a smaller one, from weights and text to a report and a folder.

    kdtl language --teacher SmolLM2-135M/ --layers 0,3,6,9,12,15,18,21,24,29 --data text.txt \\
        --method sft,kd --steps 400

The teacher is a Hugging Face folder or a GGUF file, or is trained here from a shape. Students start
from a folder, from some of the teacher's layers, or from a random initialization. Every method
trains the same student on the same rows in the same order; all are compared on held-out text.
Without arguments, this is a small example on bytes, with 390 kB of Shakespeare from the package.

    kdtl language --teacher SmolLM2-135M-Instruct.Q4_1.gguf --layers 0,3,6,9,12,15,18,21,24,29 \\
        --lr 3e-4 --method kd,sft --length 128 --batch-size 1 --steps 200 --held-out 0.02

On that text, with the same 10 of 30 layers in both students, this took 16 minutes on two busy CPU
cores (jax 0.10.2). On held-out text, where the teacher needs 1.773 bits per byte:

                 KL(T||S)  KL(S||T)  same most likely token  bits per byte
    kd           1.652     2.012     30.3%                   2.181
    sft          2.343     2.544     26.1%                   2.180
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax

from kdtl_jax import language
from kdtl_jax.recipes import _language_models as language_models
from kdtl_jax.recipes import _language_report as language_report
from kdtl_jax.recipes import _language_steps as steps
from kdtl_jax.recipes import _language_text as text_rows
from kdtl_jax.recipes import _language_training as training
from kdtl_jax.recipes import _logs, _output, _tables
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import sharding

METHODS = {method.name: method for method in language.methods()}
EXAMPLES = """
  kdtl language
  kdtl language --teacher SmolLM2-135M/ --layers 0,4,8,12,16,20,24,29 --data text.txt
  kdtl language --teacher big/ --student small/ --data chat.jsonl --method opd --prompt 64
  kdtl language --teacher big/ --student big/ --method qad --bits 4 --data text.txt
  kdtl language --student base/ --method self --lora 16 --data answers.jsonl
  kdtl language --config runs/language/config.yaml --resume
"""


@dataclass(frozen=True)
class Settings(_logs.LogSettings, types.Resumable):
    """Settings of `kdtl language`."""

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
        0.05, "share of the text held out for evaluation", metavar="SHARE", above=0, below=1,
        group="data",
    )  # fmt: skip
    teacher: str | None = setting(
        None, "a Hugging Face folder or a .gguf file; default: one trained here", metavar="PATH",
        group="models",
    )  # fmt: skip
    teacher_shape: Mapping[str, int] | None = setting(
        None, "shape of the teacher trained here; default: layers=4,width=128,heads=4",
        metavar="NAME=N,...", parse=language_models.parse_shape, group="models",
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
        metavar="NAME=N,...", parse=language_models.parse_shape, group="models",
    )  # fmt: skip
    pruned: bool = setting(
        False, "start --shape as the teacher pruned to it: some of its layers, and the channels, "
        "heads and hidden units that matter most on the text", group="models",
    )  # fmt: skip
    teacher_cache: str | None = setting(
        None, "store the teacher's distributions on the rows in this folder, or reuse them; "
        "for kd and qad", metavar="FOLDER", group="models",
    )  # fmt: skip
    cached: str = setting(
        "top_k=64", "what --teacher-cache keeps: the N most likely tokens and the mass of the "
        "rest, N draws, or all", metavar="dense|top_k=N|draws=N", parse=training.cache_form,
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
        1e-3, "AdamW's peak learning rate; it warms up and then decays to 0", short="--lr",
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
        None, "sample from the smallest set of tokens with this probability; default: all",
        metavar="P", above=0, most=1, group="losses",
    )  # fmt: skip
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


def run(settings: Settings) -> int:
    """Trains a teacher, unless one is given, and its students; evaluates and writes them."""
    if settings.list:
        rows = [(m.name, m.title, m.paper, "yes" if m.samples else "no") for m in METHODS.values()]
        return _tables.list_methods(("method", "title", "paper", "samples"), rows)
    chosen = types.select(settings.method, METHODS, "kdtl language")
    check(settings, [method.name for method in chosen])
    mesh = sharding.make_mesh(**settings.mesh) if settings.mesh else None
    files = {n: v for n in ("teacher", "student") if (v := getattr(settings, n))}
    needs_warm_start = settings.start_steps and any(method.samples for method in chosen)
    converted = [name for name, path in files.items() if language_models.is_gguf(path)]
    learners = [*([] if files else ["teacher"]), *(["warm"] if needs_warm_start else []),
               *(method.name for method in chosen)]  # fmt: skip
    files |= {f"data {path}": path for path in settings.data}
    saves, folders = [f"checkpoints/{name}" for name in learners], [*learners, *converted]
    with _output.open_run(settings, "language", files, saves=saves, models=folders) as running:
        folder, identity, say, programs = running
        say("reading")
        model_folders = {
            name: language_models.to_folder(path, folder / name)
            for name, path in (("teacher", settings.teacher), ("student", settings.student))
        }
        tokenizer = tokenizer_of(model_folders["teacher"], model_folders["student"])
        shape = text_rows.Shape(settings.length, settings.prompt, settings.held_out)
        text = text_rows.read(settings.data, tokenizer, shape, folder / "text", identity)
        row_count = len(text.train.inputs["tokens"])
        if settings.batch_size > row_count:
            raise UsageError(
                f"--batch-size {settings.batch_size}: there are {row_count} rows to learn from."
            )
        keys = training.LanguageKeys(*jax.random.split(jax.random.key(settings.seed), 4))
        language_run = training.LanguageRun(
            settings, folder, identity, mesh, model_folders["teacher"], model_folders["student"],
            tokenizer, text, learners, say, keys, _logs.read_lines(folder), {}, [],
        )  # fmt: skip
        if self_taught := [method.name for method in chosen if method.teaches_itself]:
            names, context = ", ".join(self_taught), text.teacher_context
            steps.add_note(language_run, f"{names}: before a prompt the teacher reads {context}.")
        new_student = steps.new_student(language_run)
        teacher = steps.make_teacher(language_run)
        start = steps.make_start(language_run, teacher, new_student)
        cache = steps.open_cache(language_run, teacher)
        teacher = teacher._replace(host=teacher.placed)  # the other copy is no longer needed
        trained_students = steps.train_students(language_run, chosen, teacher, start, cache)
        say.hide()
        say("measuring")
        rows, samples = steps.compare(language_run, teacher, start, trained_students)
        language_run.notes.append(programs())
        write(language_run, rows, samples)
        student_folders = [str(folder / student.method.name) for student in trained_students]
        print(f"students: {', '.join(student_folders)}")
    return 1 if all(student.diverged for student in trained_students) else 0


def check(settings: Settings, methods: Sequence[str]) -> None:
    """Raises UsageError if settings contradict each other."""
    if settings.prompt >= settings.length:
        raise UsageError(f"--prompt must be below --length {settings.length}.")
    if settings.batch_size % settings.microbatches:
        raise UsageError("--microbatches must divide --batch-size.")
    if sum((settings.student is not None, bool(settings.layers), settings.shape is not None)) > 1:
        raise UsageError("give one of --student, --layers and --shape.")
    if settings.pruned and settings.shape is None:
        raise UsageError("--pruned needs the --shape to prune to.")
    if settings.teacher_cache and not {*methods} & {*training.CACHED}:
        raise UsageError("--teacher-cache serves kd and qad: others ask about samples, or nothing.")


def tokenizer_of(teacher: str | None, student: str | None) -> language.Tokenizer:
    """The tokenizer shared by the given models; a byte tokenizer if no model is given."""
    source = teacher or student
    if source is None:
        return language.byte_tokenizer()
    tokenizer = language.tokenizer(source)
    if teacher and student:
        student_vocabulary = language.tokenizer(student).vocabulary
        try:
            language.require_same_ids(student_vocabulary, tokenizer.vocabulary)
        except ValueError as error:
            raise UsageError(
                f"--student has a different tokenizer from --teacher: {error}"
            ) from None
    return tokenizer


def write(
    language_run: training.LanguageRun,
    rows: Sequence[language_report.LanguageRow],
    samples: Sequence[language_report.Sample],
) -> None:
    """Writes the report and its files."""
    _logs.write(language_run.folder, language_run.settings.log)
    text = language_run.text
    cut, notes = text.train.cut + text.held_out.cut, [*language_run.notes]
    if cut:
        notes.append(f"{cut} records were longer than their columns and were cut short.")
    for row in rows:
        if how := row.trained.get("diverged"):
            notes.append(
                f"{row.name} diverged: {how}. Its row and folder hold the state before that."
            )
    about = {
        "name": text.name,
        "rows": len(text.train.inputs["tokens"]),
        "held_out_rows": len(text.held_out.inputs["tokens"]),
        "held_out_bytes": text.held_out_bytes,
    }
    title = "kdtl language: a language model and its students"
    language_report.write(
        language_run.folder, title, about, rows, language_run.curves, samples, notes
    )
