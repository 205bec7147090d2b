"""Distills a pretrained sentence encoder into a student of half its depth, on lines of plain text.

The student starts from some of the teacher's layers (`huggingface.student`) and learns the
teacher's hidden states, its sentence embeddings and the similarities between them, without labels.
For comparison, the same student is trained from a random initialization. The report gives fidelity
to the teacher on held-out lines: the mean cosine between the two embeddings of a line, and the
share of its ten nearest lines on which both encoders agree.

    kdtl sentences --encoder all-MiniLM-L6-v2/ --text tinyshakespeare.txt

24,762 distinct lines of Shakespeare, 500 of them held out; 200 steps of 32 lines (6,400 lines); one
seed; jax 0.10.2; two CPU cores shared with other work; 311 s of CPU time in all. Of the speeds,
only the ratio, 1.9, is meaningful:

                                      mean cosine  agreement@10  parameters  sentences/s
    Teacher                                1.0000        1.0000  22,713,216           68
    Teacher's layers, untrained            0.5198        0.2228  17,389,824          130
    Teacher's layers, distilled            0.8870        0.5460  17,389,824          130
    Random initialization, distilled       0.4263        0.0712  17,389,824          130
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _files, language, train, trees
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.interop import huggingface, linen
from kdtl_jax.models import sentence_embedding
from kdtl_jax.recipes import _logs, _output, _progress, _tables
from kdtl_jax.recipes import _sentence_training as training
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._training import in_chunks
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import report

FAMILY, DISTILLED, BASELINE = "sentences", "copied_distilled", "random_distilled"
NEIGHBORS = 10
LONGEST = 2**20  # characters of a line
LABELS = {
    "teacher": "Teacher",
    "copied_untrained": "Teacher's layers, untrained",
    DISTILLED: "Teacher's layers, distilled",
    BASELINE: "Random initialization, distilled",
}
EXAMPLES = """
  kdtl sentences --encoder all-MiniLM-L6-v2/ --text lines.txt
  kdtl sentences --config runs/sentences/config.yaml --resume
"""


@dataclass(frozen=True)
class Settings(_logs.LogSettings, types.Resumable):
    """Settings of `kdtl sentences`."""

    out: str = setting("runs/sentences", "the run folder", metavar="FOLDER")
    encoder: str | None = setting(
        None,
        "Hugging Face folder of a BERT-like model with tokenizer.json, e.g. all-MiniLM-L6-v2",
        metavar="FOLDER",
    )
    text: str | None = setting(None, "UTF-8 text, one sentence per line", metavar="FILE")
    layers: tuple[int, ...] = setting(
        (1, 3, 5), "layers of the encoder that the student takes, from 0", metavar="N,...",
        parse=types.layer_numbers,
    )  # fmt: skip
    seeds: int = setting(1, "students of each kind", metavar="N", least=1, most=1000)
    steps: int = setting(200, "steps per student", metavar="N", least=4, quick=4)
    batch_size: int = setting(32, "lines per step", metavar="N", least=1)
    learning_rate: float = types.positive_rate(
        5e-4, "AdamW's peak learning rate; it warms up and then decays to 0", short="--lr"
    )
    max_length: int = setting(
        20, "tokens per line, special ones included; longer lines are cut", metavar="N",
        least=4, most=100_000,
    )  # fmt: skip
    held_out: int = setting(
        500, "lines held out for the comparison", metavar="N", least=4, quick=60
    )
    checks: int = setting(3, "validations during training", metavar="N", least=1, quick=1)
    rounds: int = setting(3, "rounds of the speed measurement", metavar="N", least=1, quick=1)
    save_every: int | None = setting(
        None, "steps between saves; default: at the end of each student", metavar="N", least=1
    )


class Lines(NamedTuple):
    """Token ids `[N, L]` and the mask of tokens, for three disjoint sets of lines."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


class EncoderFidelity(NamedTuple):
    """How closely an encoder matches its teacher, by line."""

    cosine: np.ndarray  # [N]
    agreement: np.ndarray  # [N], of the ten nearest lines


def run(settings: Settings) -> int:
    """Distills both students, compares them with their teacher, and writes the run folder."""
    if settings.encoder is None or settings.text is None:
        raise UsageError(f"name --encoder and --text, for example:{EXAMPLES.splitlines()[1][1:]}")
    encoder, text = Path(str(settings.encoder)), Path(str(settings.text))
    files = {"encoder": str(encoder), "text": str(text)}
    learners = [(name, seed) for name in (DISTILLED, BASELINE) for seed in range(settings.seeds)]
    saves = [f"checkpoints/{name}_{seed}" for name, seed in learners]
    with _output.open_run(settings, "sentences", files, saves=saves, models=["student"]) as running:
        folder, identity, say, programs = running
        say("reading")
        lines = read(settings, encoder, text)

        # The teacher, and a student made of some of its layers.
        teacher = huggingface.load(encoder, taps=[f"layers_{i}" for i in settings.layers])
        copied = huggingface.student(teacher, layers=settings.layers)
        taps = [f"layers_{i}" for i in range(len(settings.layers))]
        apply = linen.model(copied.module, taps=taps).apply
        embed, embed_teacher = (jax.jit(_embedding(m)) for m in (apply, teacher.model))
        parts = {"validation": lines.validation, "test": lines.test}
        target = {n: embeddings(embed_teacher, teacher.params, p) for n, p in parts.items()}

        def measure(params: Params, name: str) -> EncoderFidelity:
            return fidelity(embeddings(embed, params, parts[name]), target[name])

        def agreement(params: Params) -> float:
            return float(measure(params, "validation").agreement.mean())

        example = jnp.asarray(lines.test["tokens"][:1])

        @jax.jit
        def init(key: Array) -> Params:
            return linen.model(copied.module).init(key, example).params

        starts = {DISTILLED: lambda key: copied.params, BASELINE: init}
        terms, tx = training.terms_of(settings.layers), training.optimizer(settings)
        step = train.make_step(apply, terms, training.WEIGHTS, tx, teacher=teacher.model)
        learning: dict[str, dict[str, list[float]]] = {}
        params_by_name: dict[str, list[Params]] = {}  # None if it diverged
        notes = _notes(settings)
        seconds = {"teacher": 0.0, "copied_untrained": 0.0, DISTILLED: 0.0, BASELINE: 0.0}
        for i, (name, seed) in enumerate(learners):
            title = f"{name}, seed {seed}"
            say(title)
            key_start, key = jax.random.split(jax.random.key(seed))
            advance = _progress.track_part(say, title, i, len(learners))
            job = training.StudentRun(folder, identity, f"{name}_{seed}", settings, say, advance)
            result = training.distill_student(
                step, starts[name](key_start), teacher.params, lines.train, key, agreement, job
            )
            if result.diverged:
                notes.append(f"{title} diverged and is ranked last: {result.diverged}.")
            params_by_name.setdefault(name, []).append(None if result.diverged else result.params)
            learning.setdefault(name, result.curve)
            seconds[name] += result.seconds
        say.hide()

        say("measuring")
        trained = next((p for p in params_by_name[DISTILLED] if p is not None), None)
        encoders = {"teacher": (embed_teacher, teacher.params), "student": (embed, copied.params)}
        speeds = speed(encoders, lines.test, settings.rounds)
        exact = EncoderFidelity(np.ones(settings.held_out), np.ones(settings.held_out))
        scores: dict[str, dict[str, list[EncoderFidelity]]] = {
            "teacher": {n: [exact] for n in parts}
        }
        failed = {n: EncoderFidelity(*(np.full(len(y), np.nan),) * 2) for n, y in target.items()}
        for name, params in {"copied_untrained": [copied.params], **params_by_name}.items():
            scores[name] = {
                n: [failed[n] if p is None else measure(p, n) for p in params] for n in parts
            }
        rows = []
        for name, fidelities in scores.items():
            role = "teacher" if name == "teacher" else "student"
            count = trees.count(encoders[role][1])
            rows.append(_row(name, settings, speeds[role], count, fidelities, seconds[name]))
        out = folder / "student"
        if trained is not None:
            huggingface.save(out, trained, copied.rules, config=copied.config)
            _files.write_atomic(out / "tokenizer.json", (encoder / "tokenizer.json").read_bytes())
        print(copied.report)
        results = report.Results(
            "kdtl sentences: a sentence encoder's layers, distilled into a shallow student",
            {
                "name": text.name,
                **{name: len(part["tokens"]) for name, part in lines._asdict().items()},
                "tokens_per_line": lines.train["tokens"].shape[1],
                "encoder": str(encoder),
            },
            report.compared(rows, {FAMILY: BASELINE}),
            learning,
            {},
            [*notes, programs()],
        )
        _logs.write_curves(folder, learning, settings.log)
        _output.finish(folder, results, table(rows))
        print(f"student: {out}" if trained is not None else "student: none, every seed diverged")
    return 1 if trained is None else 0


def read(settings: Settings, encoder: Path, text: Path) -> Lines:
    """Reads the lines of the text as the encoder's token ids, in three parts."""
    lines = read_lines(text)
    try:
        words = language.tokenizer(encoder)
    except ImportError as error:
        raise RuntimeError(str(error)) from None
    return split(
        [words.framed(line, settings.max_length) for line in lines],
        validation=max(4, 2 * settings.held_out // 5),
        test=settings.held_out,
        batch_size=settings.batch_size,
        padding=words.pad or 0,
    )


def read_lines(path: str | Path, *, at_least: int = 15) -> list[str]:
    """The distinct lines of a text with at least `at_least` characters, in order."""
    distinct: dict[str, None] = {}
    try:
        with _files.regular(Path(path)).open(encoding="utf-8") as file:
            while text := file.readline(LONGEST + 1):
                if len(text) > LONGEST:
                    raise ValueError(f"{path}: a line has more than {LONGEST:,} characters.")
                lines = map(str.strip, text.splitlines())
                distinct |= dict.fromkeys(line for line in lines if len(line) >= at_least)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from None
    return list(distinct)


def split(
    ids: Sequence[Sequence[int]], *, validation: int, test: int, batch_size: int, padding: int
) -> Lines:
    """Pads token ids and splits them in three parts, shuffled with a fixed seed."""
    held_out = validation + test
    if len(ids) < held_out + batch_size:
        raise ValueError(
            f"{len(ids)} distinct lines, but {held_out} are held out and a batch needs "
            f"{batch_size}. Give more text, or hold out less."
        )
    width = max(map(len, ids))
    tokens = np.full((len(ids), width), padding, np.int32)
    mask = np.zeros((len(ids), width), np.bool_)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    order = np.random.default_rng(0).permutation(len(ids))
    cuts = np.split(order, [test, held_out])
    test_part, validation_part, train_part = ({"tokens": tokens[r], "mask": mask[r]} for r in cuts)
    return Lines(train_part, validation_part, test_part)


def embeddings(
    embed: Callable[[Params, Any], Array],
    params: Params,
    part: Mapping[str, np.ndarray],
    chunk: int = 100,
) -> np.ndarray:
    """Sentence embeddings `[N, width]` of unit length."""
    return in_chunks(lambda x: embed(params, x), dict(part), chunk)


def fidelity(student: np.ndarray, teacher: np.ndarray) -> EncoderFidelity:
    """Cosines and agreement of the nearest lines, for unit embeddings `[N, width]`.

    The agreement is NaN if any embedding is not finite.
    """
    cosine = np.sum(student * teacher, axis=1)
    nearest, expected = _nearest(student), _nearest(teacher)
    overlap = [len(set(a) & set(b)) for a, b in zip(nearest, expected, strict=True)]
    # Neighbors are undefined if any embedding is not finite.
    is_finite = np.isfinite(student).all() and np.isfinite(teacher).all()
    return EncoderFidelity(
        cosine, np.where(is_finite, np.asarray(overlap) / nearest.shape[1], np.nan)
    )


def speed(
    encoders: Mapping[str, tuple[Callable[[Params, Any], Array], Params]],
    part: Mapping[str, np.ndarray],
    rounds: int,
) -> dict[str, float]:
    """Lines per second of each encoder, without tokenization: median of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, (embed, params) in encoders.items():
            start = time.perf_counter()
            embeddings(embed, params, part)
            times[name].append(time.perf_counter() - start)
    return {name: len(part["tokens"]) / float(np.median(t)) for name, t in times.items()}


def _nearest(x: np.ndarray) -> np.ndarray:
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    count = min(NEIGHBORS, len(x) - 1)
    return np.argpartition(-similarity, count - 1, axis=1)[:, :count]


def _embedding(model: ModelFn) -> Callable[[Params, Any], Array]:
    def embed(params: Params, inputs: Any) -> Array:
        outputs, _ = model(params, None, inputs)
        return sentence_embedding(outputs["last_hidden"], inputs["mask"])

    return embed


def _row(
    name: str,
    settings: Settings,
    lines_per_second: float,
    parameters: int,
    fidelities: Mapping[str, Sequence[EncoderFidelity]],
    seconds: float,
) -> report.Row:
    test = fidelities["test"]
    trained = seconds > 0
    repeated = 1 if trained else settings.seeds  # untrained: the same for every seed
    cosine = report.interval([float(f.cosine.mean()) for f in test] * repeated)
    fields: dict[str, Any] = {
        "mean_cosine": cosine.mean,
        "mean_cosine_ci95": None if cosine.low is None else [cosine.low, cosine.high],
        "agreement_at_10": float(np.mean([f.agreement.mean() for f in test])),
        "sentences_per_second": round(lines_per_second, 1),
    }
    if trained:
        fixed = ("layers", "steps", "batch_size", "learning_rate", "max_length")
        fields |= {name: getattr(settings, name) for name in fixed}
        fields |= {f"weight_{term}": weight for term, weight in training.WEIGHTS.items()}
    validation_agreement, test_agreement = (
        np.stack([f.agreement for f in fidelities[part]] * repeated)
        for part in ("validation", "test")
    )
    return report.Row(
        name,
        FAMILY,
        LABELS[name],
        parameters,
        report.interval(test_agreement.mean(axis=1), test_agreement, is_share=True),
        report.interval(validation_agreement.mean(axis=1), validation_agreement, is_share=True),
        seconds,
        fields,
        examples=test_agreement,
    )


def table(rows: Sequence[report.Row]) -> str:
    """Fidelity, size and speed, one line per encoder."""
    head = ("", "mean cosine", "agreement@10", "parameters", "sentences/s", "trained in s")
    body = [
        (
            row.label,
            f"{row.settings['mean_cosine']:.4f}",
            f"{row.test.mean:.4f}",
            f"{row.parameters:,}",
            f"{row.settings['sentences_per_second']:,.0f}",
            f"{row.seconds:.0f}" if row.seconds else "–",
        )
        for row in rows
    ]
    return _tables.aligned([head, *body])


def _notes(settings: Settings) -> list[str]:
    return [
        f"“Accuracy” here is agreement@{NEIGHBORS}: the share of a held-out line's nearest "
        "held-out lines that student and teacher agree on. The mean cosine of their embeddings and "
        "the speed are listed with each method's settings. The speed was measured on this machine "
        "during this run, without tokenization; the encoders took turns.",
        f"The student takes layers {', '.join(map(str, settings.layers))}, the embeddings and the "
        "pooler of its teacher; its twin starts at random. Both are trained in the same way, on "
        "the teacher's hidden states, its embeddings and their similarities, without labels.",
    ]
