"""A pretrained sentence encoder taught to a student of half its depth, on lines of plain text.

The student takes some of the teacher's layers as they are (`huggingface.student`) and learns the
teacher's hidden states, its sentence embeddings and the similarities between them, without labels.
Beside it stands the same student from random initialization. What is reported is fidelity to the
teacher on held-out lines: the mean cosine of the two embeddings of a line, and the share of its ten
nearest lines that both encoders name.

    kdtl transfer --task sentences --encoder all-MiniLM-L6-v2/ --text tinyshakespeare.txt

24,762 distinct lines of Shakespeare, 500 of them held out, 200 steps of 32 lines (6,400 lines), one
seed; jax 0.10.2, two CPU cores that were busy with other work, 311 s of CPU time in all (so the
speeds mean their ratio, 1.9):

                                      mean cosine  agreement@10  parameters  sentences/s
    Teacher                                1.0000        1.0000  22,713,216           68
    Teacher's layers, untrained            0.5198        0.2228  17,389,824          130
    Teacher's layers, distilled            0.8870        0.5460  17,389,824          130
    Random initialization, distilled       0.4263        0.0712  17,389,824          130
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import losses, train, trees
from kdtl_jax._types import ModelFn, Params, Variables
from kdtl_jax.interop import huggingface, linen
from kdtl_jax.models import sentence_embedding
from kdtl_jax.objective import Inputs, Masked
from kdtl_jax.run import data, loop, report

FAMILY, BASELINE, NEIGHBORS = "sentences", "random_distilled", 10
WEIGHTS = {"hidden": 1.0, "embedding": 1.0, "relation": 1.0}


class Settings(NamedTuple):
    """What fixes the experiment."""

    layers: tuple[int, ...] = (1, 3, 5)
    seeds: int = 1
    steps: int = 200
    batch_size: int = 32
    rate: float = 5e-4
    max_length: int = 20  # tokens, the special ones included
    validation: int = 200  # lines
    test: int = 500  # lines
    checks: int = 3  # validations along the way
    rounds: int = 3  # of the speed measurement


class Lines(NamedTuple):
    """Token ids `[N, L]` and where there are tokens, of three disjoint sets of lines."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


class Fidelity(NamedTuple):
    """How like its teacher an encoder is, by line."""

    cosine: np.ndarray  # [N]
    agreement: np.ndarray  # [N], of the ten nearest lines


class Outcome(NamedTuple):
    """What `kdtl transfer` takes from here."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    surgery: Any  # transforms.Report
    student: huggingface.Pretrained  # the copied and distilled one of the first seed


def read_lines(path: str | Path, *, at_least: int = 15) -> list[str]:
    """The distinct lines of a text with so many characters or more, in order.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from None
    stripped = (line.strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in stripped if len(line) >= at_least))


def tokenizer(folder: str | Path) -> Callable[[Sequence[str], int], list[list[int]]]:
    """`encode(lines, max_length) -> ids` by the folder's tokenizer.json.

    Raises:
      ImportError: without the `tokenizers` package.
      FileNotFoundError: if the folder has no tokenizer.json.
    """
    try:
        package = importlib.import_module("tokenizers")
    except ImportError:
        raise ImportError(
            "reading tokenizer.json needs the package tokenizers: pip install 'kdtl_jax[hub]'."
        ) from None
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    model = package.Tokenizer.from_file(str(path))
    model.no_padding()

    def encode(lines: Sequence[str], max_length: int) -> list[list[int]]:
        model.enable_truncation(max_length)
        return [encoding.ids for encoding in model.encode_batch(list(lines))]

    return encode


def split(ids: Sequence[Sequence[int]], settings: Settings, *, padding: int) -> Lines:
    """Padded token ids in three parts, drawn once and for all.

    Raises:
      ValueError: if there are too few lines.
    """
    held = settings.validation + settings.test
    if len(ids) < held + settings.batch_size:
        raise ValueError(
            f"{len(ids)} distinct lines, but {held} are held out and a batch needs "
            f"{settings.batch_size}. Give more text, or hold out less."
        )
    width = max(map(len, ids))
    tokens = np.full((len(ids), width), padding, np.int32)
    mask = np.zeros((len(ids), width), np.bool_)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    order = np.random.default_rng(0).permutation(len(ids))
    cuts = np.split(order, [settings.test, held])
    test, validation, train_rows = ({"tokens": tokens[r], "mask": mask[r]} for r in cuts)
    return Lines(train_rows, validation, test)


def run(
    folder: str | Path,
    lines: Lines,
    settings: Settings,
    progress: Callable[[str], None],
) -> Outcome:
    """Distills both students and compares them with their teacher on the held-out lines.

    Raises:
      ValueError: if the encoder has no such layers, or lines are longer than its positions.
    """
    teacher_taps = [f"layers_{i}" for i in settings.layers]
    teacher = huggingface.load(folder, taps=teacher_taps)
    copied = huggingface.student(teacher, layers=settings.layers)
    taps = [f"layers_{i}" for i in range(len(settings.layers))]
    apply = linen.model(copied.module, taps=taps).apply
    embed = jax.jit(_embedding(apply))
    embed_teacher = jax.jit(_embedding(teacher.model))
    target = {
        name: embeddings(embed_teacher, teacher.params, part)
        for name, part in (("validation", lines.validation), ("test", lines.test))
    }

    def measure(params: Params, name: str) -> Fidelity:
        part = lines.validation if name == "validation" else lines.test
        return fidelity(embeddings(embed, params, part), target[name])

    one = linen.model(copied.module)
    example = jnp.asarray(lines.test["tokens"][:1])
    init = jax.jit(lambda key: one.init(key, example).params)
    starts = {
        "copied_distilled": lambda seed: copied.params,
        BASELINE: lambda seed: init(jax.random.key(seed)),
    }
    step = train.make_step(
        apply,
        _terms(settings.layers),
        WEIGHTS,
        _optimizer(settings),
        teacher=teacher.model,
    )
    learning: dict[str, dict[str, list[float]]] = {}
    ends: dict[str, list[Params]] = {}
    seconds: dict[str, float] = {}
    for name, start in starts.items():
        began = time.perf_counter()
        for seed in range(settings.seeds):
            progress(f"{name}, seed {seed}")
            params, curve = _distill(
                step, start(seed), teacher.params, lines, settings, seed, measure, progress
            )
            ends.setdefault(name, []).append(params)
            if not seed:
                learning[name] = curve
        seconds[name] = time.perf_counter() - began

    progress("measuring")
    first = ends["copied_distilled"][0]
    speeds = speed(
        {"teacher": (embed_teacher, teacher.params), "student": (embed, first)},
        lines.test,
        settings.rounds,
    )
    exact = Fidelity(np.ones(settings.test), np.ones(settings.test))
    found = {
        "teacher": (teacher.params, [exact], [exact], 0.0),
        "copied_untrained": (
            copied.params, [measure(copied.params, "validation")],
            [measure(copied.params, "test")], 0.0,
        ),
    } | {
        name: (
            params[0], [measure(p, "validation") for p in params],
            [measure(p, "test") for p in params], seconds[name],
        )
        for name, params in ends.items()
    }  # fmt: skip
    rows = [
        _row(name, settings, speeds["teacher" if name == "teacher" else "student"], *values)
        for name, values in found.items()
    ]
    return Outcome(rows, learning, copied.report, copied._replace(params=first))


def embeddings(
    embed: Callable[[Params, Any], Array],
    params: Params,
    part: Mapping[str, np.ndarray],
    chunk: int = 100,
) -> np.ndarray:
    """Sentence embeddings `[N, width]` of unit length, in chunks of one shape."""
    count = len(part["tokens"])
    found = []
    for first in range(0, count, chunk):
        rows = np.minimum(np.arange(first, first + chunk), count - 1)
        found.append(np.asarray(embed(params, {name: x[rows] for name, x in part.items()})))
    return np.concatenate(found)[:count]


def fidelity(student: np.ndarray, teacher: np.ndarray) -> Fidelity:
    """Cosines, and agreement of the nearest lines, of unit embeddings `[N, width]`."""
    cosine = np.sum(student * teacher, axis=1)
    ours, theirs = _nearest(student), _nearest(teacher)
    shared = [len(set(a) & set(b)) for a, b in zip(ours, theirs, strict=True)]
    return Fidelity(cosine, np.asarray(shared) / ours.shape[1])


def speed(
    encoders: Mapping[str, tuple[Callable[[Params, Any], Array], Params]],
    part: Mapping[str, np.ndarray],
    rounds: int,
) -> dict[str, float]:
    """Lines per second of each encoder, tokens ready: the median of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, (embed, params) in encoders.items():
            began = time.perf_counter()
            embeddings(embed, params, part)
            times[name].append(time.perf_counter() - began)
    return {name: len(part["tokens"]) / float(np.median(spent)) for name, spent in times.items()}


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


def _terms(layers: Sequence[int]) -> Callable[[Inputs], dict[str, Any]]:
    def terms(x: Inputs) -> dict[str, Any]:
        mask = x.batch["inputs"]["mask"]
        each = [
            losses.last_axis_mse(x.student[f"layers_{j}"], x.teacher[f"layers_{i}"])
            for j, i in enumerate(layers)
        ]
        ours, theirs = (sentence_embedding(o["last_hidden"], mask) for o in (x.student, x.teacher))
        return {
            "hidden": Masked(jnp.mean(jnp.stack(each), axis=0), mask),
            "embedding": losses.cosine_distance(ours, theirs),
            "relation": losses.rkd_distance(ours, theirs),
        }

    return terms


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    warmup = max(1, settings.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.rate, warmup, settings.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))


def _distill(
    step: train.Step,
    start: Params,
    teacher: Params,
    lines: Lines,
    settings: Settings,
    seed: int,
    measure: Callable[[Params, str], Fidelity],
    progress: Callable[[str], None],
) -> tuple[Params, dict[str, list[float]]]:
    key = jax.random.key(seed)
    batches = data.resident({"inputs": lines.train}, settings.batch_size, key=key)
    state = train.init_state(start, _optimizer(settings), key=key)

    def log(line: Mapping[str, Any]) -> None:
        if "loss" in line:
            progress(f"  step {line['step']} of {settings.steps}, loss {line['loss']:.4f}")

    result = loop.run(
        step,
        state,
        batches,
        Variables(teacher),
        steps=settings.steps,
        log=log,
        log_every=max(1, settings.steps // 10),
        evaluate=lambda state: {
            "agreement": float(measure(state.params, "validation").agreement.mean())
        },
        evaluate_every=max(1, settings.steps // settings.checks),
    )
    curve = {
        "epoch": [float(line["step"]) for line in result.evaluations],
        "validation_accuracy": [line["eval/agreement"] for line in result.evaluations],
    }
    return result.state.params, curve


LABELS = {
    "teacher": "Teacher",
    "copied_untrained": "Teacher's layers, untrained",
    "copied_distilled": "Teacher's layers, distilled",
    BASELINE: "Random initialization, distilled",
}


def _row(
    name: str,
    settings: Settings,
    lines_per_second: float,
    params: Params,
    validation: Sequence[Fidelity],
    test: Sequence[Fidelity],
    seconds: float,
) -> report.Row:
    trained = seconds > 0
    repeated = 1 if trained else settings.seeds  # untrained: the same for every seed
    cosine = report.interval([float(f.cosine.mean()) for f in test] * repeated)
    described: dict[str, Any] = {
        "mean_cosine": cosine.mean,
        "mean_cosine_ci95": cosine.ci95,
        "agreement_at_10": float(np.mean([f.agreement.mean() for f in test])),
        "sentences_per_second": round(lines_per_second, 1),
    }
    if trained:
        fixed = ("layers", "steps", "batch_size", "rate", "max_length")
        described |= {k: v for k, v in settings._asdict().items() if k in fixed}
        described |= {f"weight_{term}": weight for term, weight in WEIGHTS.items()}
    return report.Row(
        name,
        FAMILY,
        LABELS[name],
        trees.count(params),
        report.interval([float(f.agreement.mean()) for f in test] * repeated),
        report.interval([float(f.agreement.mean()) for f in validation] * repeated),
        seconds,
        described,
    )
