"""Training of one model in `kdtl language`, with logging, evaluation, saving and resuming.

The teacher runs at every step, or its distributions on the rows are read from a cache.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from kdtl_jax import _files, language, models, train
from kdtl_jax._types import ModelFn, Params, Variables
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.objective import Inputs, Metrics
from kdtl_jax.recipes import _logs, _progress, _saves
from kdtl_jax.recipes._language_text import Rows, Text
from kdtl_jax.run import checkpoint, data, loop, sharding, teacher_cache
from kdtl_jax.run.measure import step_times
from kdtl_jax.train import Batch, TrainState

TEMPERATURE = 0.8  # of the continuations in the report
CACHED = ("kd", "qad")  # methods that learn from a teacher only on the data
FORMS = "dense, top_k=N or draws=N"


class LanguageKeys(NamedTuple):
    """The independent sources of randomness in a run."""

    teacher: Array
    student: Array
    order: Array
    sample: Array


class LanguageRun(NamedTuple):
    """The state shared by all steps of a run."""

    settings: Any  # `language.Settings`
    folder: Path
    identity: str  # of the run, in its checkpoints
    mesh: Mesh | None
    teacher: str | None  # folders of the models, if given
    student: str | None
    tokenizer: language.Tokenizer
    text: Text
    learners: Sequence[str]  # names of the models to train, in order
    say: _progress.Progress
    keys: LanguageKeys
    lines: _logs.Lines  # of the metrics file so far
    curves: dict[str, list[dict[str, float]]]  # measurements of each model, as they are made
    notes: list[str]  # additional notes of the report, as they arise

    @property
    def source(self) -> str | None:
        """The folder of the tokenizer."""
        return self.teacher or self.student

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a sample."""
        return () if self.tokenizer.eos is None else (self.tokenizer.eos,)


class LanguageResult(NamedTuple):
    """The result of a training."""

    params: Params
    seconds: float


Measure = Callable[[Params], Mapping[str, float]]


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Places a tree on the mesh, if there is one."""
    return tree if mesh is None else sharding.place(tree, mesh, tensor=models.TENSOR_AXES)


def cache_form(value: Any) -> str:
    """`dense`, `top_k=64` or `draws=50`."""
    name, _, size = str(value).partition("=")
    if value != "dense" and not (
        name in ("top_k", "draws") and size.isdecimal() and 0 < int(size) < 10**5
    ):
        raise ValueError(f"expected {FORMS}, got {value!r}")
    return str(value)


def write_cache(
    folder: str,
    teacher: PretrainedDecoder,
    tokenizer: language.Tokenizer,
    rows: Rows,
    *,
    form: str,
    batch_size: int,
    seed: int,
    say: _progress.Say,
) -> teacher_cache.Cache:
    """Opens the cache in a folder, after completing it if necessary.

    Raises:
      ValueError: if its weights, text, tokenizer or form differ, naming which; or if the teacher's
        outputs are NaN.
    """
    name, _, size = form.partition("=")
    cut: dict[str, int] = {name: int(size)} if size else {}
    outputs = language.stored_outputs(
        teacher.model,
        **cut,
        key=jax.random.key(seed) if "draws" in cut else None,
        vocabulary=tokenizer.size,
    )
    inputs = {n: rows.inputs[n] for n in ("tokens", "segments", "learned")}
    if "draws" in cut:
        inputs["row"] = np.arange(len(inputs["tokens"]), dtype=np.int32)
    names = teacher.config.get("architectures") or ["decoder"]
    about = {"stored": form, "tokenizer": tokenizer.fingerprint[:12]}
    options: dict[str, Any] = {
        "model": f"{names[0]} {_files.digest(_files.as_json(teacher.config))[:12]}",
        "preprocessing": about | ({"seed": seed} if "draws" in cut else {}),
        "taps": language.stored_names(**cut),
        "dtype": "float32",
    }
    expect = teacher_cache.fingerprint(teacher.params, {"inputs": inputs}, **options)
    throttled = _progress.throttle(say, 5.0)
    teacher_cache.write(
        folder,
        outputs,
        teacher.params,
        {"inputs": inputs},
        batch_size=batch_size,
        weights=expect.teacher,
        progress=lambda done, total: throttled(f"cache: {done:,} of {total:,} rows", done == total),
        **options,
    )
    return teacher_cache.open_cache(folder, expect=expect, contents=False)


def batches(
    rows: Rows, batch_size: int, key: Array, cache: teacher_cache.Cache | None = None
) -> data.Source:
    """Batches of the rows and their cached teacher; the order depends only on key and step."""
    arrays = {"inputs": rows.inputs}

    def read(epoch: int, chosen: np.ndarray) -> Batch:
        batch = data.take_rows(arrays, chosen)
        return batch if cache is None else {**batch, "teacher": teacher_cache.rows(cache, chosen)}

    return data.stream(read, len(rows.inputs["tokens"]), batch_size, key=key)


def train_model(
    name: str,
    learner: language.Learner,
    state: TrainState,
    run: LanguageRun,
    teacher_params: Any,
    steps: int,
    measure: Measure,
    cache: teacher_cache.Cache | None = None,
    *,
    on_nonfinite: Callable[[loop.Nonfinite], None] = loop.raise_nonfinite,
) -> LanguageResult:
    """Trains up to `steps`, from the newest save if the run resumes; adds to the curves of `run`.

    Args:
      name: of the method, in the metrics file and under `checkpoints/`.
      measure: metrics of the parameters, during training and at the end.
      cache: the teacher's outputs on the rows, if the step reads them.
      on_nonfinite: as `loop.run`; the state before such an update is saved and returned.

    Raises:
      SystemExit: after a signal, with everything saved.
      FloatingPointError: by default, if the loss is no longer finite.
    """
    start_time, settings, rows = time.perf_counter(), run.settings, run.text.train
    advance = _progress.track_part(run.say, name, len(run.curves), len(run.learners))
    state, step = learner.begin(state), learner.step
    if run.mesh is not None:
        state = place(state, run.mesh)
        step = sharding.keep_placement(step, state)
    saves = _saves.restore(
        run.folder, run.identity, name, state, resume=settings.resume, start_time=start_time
    )
    rate_text = make_timer(settings.batch_size * rows.inputs["tokens"].shape[1], steps)

    def log(line: dict[str, Any]) -> None:
        write(line)
        if "loss" in line:
            progress = f"{name}: step {line['step']} of {steps}, loss {line['loss']:.4f}"
            run.say(f"{progress}{rate_text(line['step'])}")
        else:
            scores = {k.removeprefix("eval/"): v for k, v in line.items() if k != "step"}
            run.say(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))

    def keep_line(line: dict[str, Any]) -> bool:
        return line["step"] <= saves.step

    with (
        _saves.open_saves(saves, checkpoint.newest(1)) as save,
        _logs.method_log(run.folder, run.lines, name, keep_line) as write,
    ):
        result = loop.run(
            step,
            saves.state,
            batches(rows, settings.batch_size, run.keys.order, cache),
            teacher_params,
            steps=steps,
            log=log,
            log_every=max(1, min(50, steps // 10)),
            evaluate=lambda state: measure(state.params),
            evaluate_every=max(1, steps // settings.checks),
            save=save,
            save_every=settings.save_every,
            meta=saves.meta,
            on_nonfinite=on_nonfinite,
            place=partial(_place_batch, mesh=run.mesh),
            reached=lambda step: advance(step, steps),
        )
    seconds = _saves.seconds(saves)
    params, curve = result.state.params, result.evaluations
    if not curve or curve[-1]["step"] != result.step:  # training ended early
        curve = [*curve, curve_line(result.step, measure(params))]
    run.curves[name] = curve
    _logs.write_method_events(run.folder, run.lines.get(name, []), settings.log)
    return LanguageResult(params, seconds)


def curve_line(step: int, scores: Mapping[str, float]) -> dict[str, float]:
    """A measurement as a line of the curve."""
    return {"step": step} | {f"eval/{name}": value for name, value in scores.items()}


def make_timer(tokens: int, steps: int) -> Callable[[int], str]:
    """`rate_text(step)`: tokens per second since the first line of the log, and the time left.

    The time before the first line includes compilation. Lines arrive late, by a constant number of
    steps, so the rate is measured from the first line rather than between adjacent lines.
    """
    first: tuple[int, float] | None = None

    def rate_text(step: int) -> str:
        nonlocal first
        now = time.perf_counter()
        if first is None:
            first = step, now
            return ""
        rate = (step - first[0]) / max(now - first[1], 1e-9)
        remaining = _progress.format_duration((steps - step) / max(rate, 1e-9))
        return f", {rate * tokens:,.0f} tokens/s, {remaining} left"

    return rate_text


def make_measure(
    run: LanguageRun,
    student: ModelFn,
    weights: Callable[[Params], Params],
    teacher: PretrainedDecoder,
) -> Callable[..., dict[str, float]]:
    """`measure(params, reference=teacher.params)`: fidelity and bits per byte of held-out text."""
    teacher_fn, inputs = language.model(teacher.model), run.text.held_out.inputs
    arrays = {"inputs": {name: inputs[name] for name in ("tokens", "segments", "learned")}}

    def measures(inputs: Inputs) -> dict[str, Any]:
        targets, where = language.counted(inputs)
        fidelity = language.fidelity(
            inputs.student, inputs.batch["teacher"], targets, where, vocabulary=run.tokenizer.size
        )
        return fidelity._asdict()

    def apply(params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False):
        return student(weights(params), model_state, inputs)

    evaluate = train.make_eval_step(apply, measures)

    @jax.jit
    def evaluate_batch(params: Params, teacher_params: Params, batch: Batch) -> Metrics:
        teacher_outputs, _ = teacher_fn(teacher_params, None, batch["inputs"])
        return evaluate(Variables(params), {**batch, "teacher": teacher_outputs})

    add = jax.jit(train.add_metrics)

    def measure(params: Params, reference: Params = teacher.params) -> dict[str, float]:
        total: Metrics | None = None
        for batch in data.in_order(arrays, run.settings.batch_size):
            metrics = evaluate_batch(params, reference, _place_batch(batch, run.mesh))
            total = metrics if total is None else add(total, metrics)
        assert total is not None
        means = {name: float(value) for name, value in train.values(total).items()}
        count = float(total["nats"].weight)
        for name, nats in (("", "nats"), ("teacher_", "teacher_nats")):
            bits = means[nats] * count / np.log(2)
            means[f"{name}bits_per_byte"] = bits / max(run.text.held_out_bytes, 1)
        return means

    return measure


def _place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    return jax.device_put(batch) if mesh is None else sharding.place_batch(batch, mesh)


def prompts(rows: Rows, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the first rows' prompts, and which of them belong to the row's last text."""
    tokens, segments = (np.asarray(rows.inputs[n][:count, :length]) for n in ("tokens", "segments"))
    return tokens, np.asarray(language.last_text(jnp.asarray(segments)))


def make_sampler(run: LanguageRun, decoder: Any) -> Callable[[Params], list[list[int]]]:
    """`draw(params)`: continuations of the first held-out prompts, each with its own key."""
    settings = run.settings
    start = prompts(run.text.held_out, settings.samples, settings.prompt)
    tokens, mask = (jnp.asarray(x) for x in start)
    keys = jax.random.split(run.keys.sample, len(tokens))

    @jax.jit
    def sample_all(params: Params, keys: Array) -> language.Samples:
        return language.sample(
            decoder, params, tokens, keys=keys,
            length=min(settings.length - settings.prompt, 64), prompt_mask=mask,
            temperature=TEMPERATURE, stop_tokens=run.stop_tokens,
        )  # fmt: skip

    def draw(params: Params) -> list[list[int]]:
        samples = sample_all(params, keys)
        ids, real = np.asarray(samples.tokens), np.asarray(samples.mask)
        return [row[is_real].tolist() for row, is_real in zip(ids, real, strict=True)]

    return draw


def speed(model: ModelFn, params: Params, rows: Rows, batch_size: int) -> float:
    """Tokens per second of a forward pass without logits: the median of five."""
    batch = {n: rows.inputs[n][:batch_size] for n in ("tokens", "segments")}

    @jax.jit
    def forward(params: Params, batch: Any) -> Any:
        return model(params, None, batch)[0]["hidden"]

    seconds = step_times(lambda: forward(params, batch), 5, warmup=1).median
    return batch["tokens"].size / seconds
