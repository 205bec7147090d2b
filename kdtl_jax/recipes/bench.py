"""Benchmarks the train step of distillation pairs: MLPs, CIFAR ResNets, ViTs, decoders.

It measures this library's `jit_step` and `jit_epoch` on random data that stays on the device.
Random weights and inputs cost the same as trained ones.

Measured with `kdtl bench --steps 8` on two shared cores of an AMD EPYC (float32; ceilings 104
GFLOP/s, 51.5 GB/s; jax 0.10.2), per step: mlp 25 ms, 54% of the roofline; resnet 978 ms, 47%; vit
922 ms, 36%; decoder 1000 ms, 50%; all bound by compute. No accelerator was available.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import _files, losses, models, train, trees
from kdtl_jax._types import Variables
from kdtl_jax.interop import function, linen
from kdtl_jax.interop.linen import Linen
from kdtl_jax.models import DecoderConfig, Norm
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _bench_report, _devices, _folders, _progress
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import setting
from kdtl_jax.run import measure, sharding
from kdtl_jax.train import precision

WEIGHTS = {"kd": 0.9, "task": 0.1}
TEMPERATURE = 4.0


NAMES = ("mlp", "resnet", "vit", "decoder")
EXAMPLES = """
  kdtl bench --preset resnet --dtype bfloat16
  kdtl bench --preset mlp --devices 8 --trace runs/trace
"""


@dataclass(frozen=True)
class Settings(types.Output):
    """Settings of `kdtl bench`."""

    out: str = setting("runs/bench", "the run folder", metavar="FOLDER")
    force: bool = setting(False, "overwrite an earlier run in --out; a stopped run starts over")
    preset: Literal["mlp", "resnet", "vit", "decoder", "all"] = setting(
        "all", "pair of models to measure"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "dtype of the arithmetic")
    batch_size: int | None = setting(
        None, "examples per step; default: the pair's", metavar="N", least=1, most=10**7
    )
    steps: int = setting(20, "measured steps", metavar="N", least=1, most=10**7)
    devices: int | None = setting(
        None, "measure scaling on 1, 2, 4 … N devices; on a CPU, N virtual ones; default: all",
        metavar="N", least=1, most=4096,
    )  # fmt: skip
    trace: str | None = setting(None, "write a jax.profiler trace here", metavar="FOLDER")


class Preset(NamedTuple):
    """A pair of models and their inputs."""

    name: str
    teacher: Linen  # (init, apply)
    student: Linen
    shape: tuple[int, ...]  # of one example
    classes: int  # or the vocabulary, if the example is a row of tokens
    batch_size: int
    tx: optax.GradientTransformation
    about: str


class Scaled(NamedTuple):
    """Weak scaling: the same number of examples per device on more devices."""

    devices: int
    seconds: float  # per step
    examples_per_second: float
    efficiency: float  # rate per device, relative to one device


class Measured(NamedTuple):
    """All results for one preset. Seconds are per train step."""

    preset: str
    about: str
    dtype: str
    batch_size: int
    teacher_parameters: int
    student_parameters: int
    compile_seconds: float
    steps: measure.Distribution  # each awaited
    seconds: float  # only the last one awaited: the loop's rate
    examples_per_second: float
    epoch_path: str  # "scan", or "steps" where single steps are faster
    epoch_seconds: float  # within one program for the whole epoch, if the path is "scan"
    cost: measure.Cost
    memory: measure.Memory
    roofline: measure.Roofline | None
    scaling: tuple[Scaled, ...]


class Workload(NamedTuple):
    """A preset ready to run."""

    step: train.Step
    state: Callable[[], train.TrainState]  # a fresh one: steps donate theirs
    teacher: Variables
    batch: Callable[[int], dict[str, Array]]  # `batch(n)`: n random examples
    parameters: tuple[int, int]  # teacher's, student's


def presets(*, quick: bool = False) -> dict[str, Preset]:
    """The presets by name; `quick` makes each of them tiny."""
    momentum, adamw = optax.sgd(0.1, momentum=0.9), optax.adamw(1e-3)
    slow = optax.sgd(0.05, momentum=0.9)
    if quick:
        large, small = (linen.model(models.resnet(8, 10, channels=(n, n, n, n))) for n in (8, 4))
        chosen = (
            Preset("mlp", _mlp(64), _mlp(16), (32,), 10, 128, momentum,
                   "32-64-10 teaches 32-16-10"),
            Preset("resnet", large, small, (8, 8, 3), 10, 4, slow,
                   "resnet8, 8 channels, teaches resnet8, 4 channels, 8x8 images"),
            Preset("vit", _vit(32, 1, 2), _vit(16, 1, 2), (8, 8, 3), 100, 4, adamw,
                   "ViT 32 wide teaches 16 wide, one layer each; 8x8 images, patch 4"),
            Preset("decoder", _decoder(32, 1, 2, 64), _decoder(16, 1, 2, 64), (8,), 64, 2, adamw,
                   "GPT-2 32 wide teaches 16 wide, one layer each; 64 tokens, length 8"),
        )  # fmt: skip
    else:
        large, small = (linen.model(models.resnet_x4(depth, 100)) for depth in (32, 8))
        chosen = (
            Preset("mlp", _mlp(1200, 1200), _mlp(800, 800), (784,), 10, 128, momentum,
                   "784-1200-1200-10 teaches 784-800-800-10"),
            Preset("resnet", large, small, (32, 32, 3), 100, 16, slow,
                   "resnet32x4 teaches resnet8x4, 32x32 images"),
            Preset("vit", _vit(192, 12, 3), _vit(96, 6, 3), (32, 32, 3), 100, 32, adamw,
                   "ViT 192 wide, 12 layers, teaches 96 wide, 6 layers; 32x32 images, patch 4"),
            Preset("decoder", _decoder(384, 6, 6), _decoder(192, 4, 3), (128,), 8192, 8, adamw,
                   "GPT-2 384 wide, 6 layers, teaches 192 wide, 4 layers; 8192 tokens, length 128"),
        )  # fmt: skip
    return {preset.name: preset for preset in chosen}


def workload(preset: Preset, dtype: str) -> Workload:
    """Models, step and random data of a preset, computing in `dtype` with float32 parameters."""
    teacher, student = preset.teacher, preset.student
    terms = _terms(1.0 if preset.name == "decoder" else TEMPERATURE)  # text: 1, as is usual
    example = _random(preset, 1)["inputs"]
    keys = jax.random.split(jax.random.key(0))
    teacher_variables, student_variables = (
        jax.jit(model.init)(key, example)
        for model, key in zip((teacher, student), keys, strict=True)
    )
    student_fn, teacher_fn = student.apply, teacher.apply
    if dtype != "float32":
        lower = functools.partial(precision.compute_in, dtype=jnp.dtype(dtype))
        student_fn, teacher_fn = lower(student_fn), lower(teacher_fn)
    tx = preset.tx if dtype != "float16" else precision.loss_scaling(preset.tx)
    step = train.make_step(student_fn, terms, WEIGHTS, tx, teacher=teacher_fn)

    def state() -> train.TrainState:
        params, model_state = student_variables
        return train.init_state(params, tx, key=jax.random.key(1), model_state=model_state)

    parameters = trees.count(teacher_variables.params), trees.count(student_variables.params)
    return Workload(step, state, teacher_variables, lambda n: _random(preset, n), parameters)


def run(settings: Settings) -> None:
    """Measures the presets, prints the table, and writes bench.json and report.html."""
    devices = len(_devices.first_devices(settings.devices))
    with _folders.run_folder(settings, "bench") as run_folder_, _progress.show_progress() as say:
        say("ceilings")
        limits = measure.ceilings(settings.dtype, quick=settings.quick)
        chosen, results = presets(quick=settings.quick), []
        for name in NAMES if settings.preset == "all" else (settings.preset,):
            say(name)
            results.append(measure_preset(settings, chosen[name], limits, devices))
        folder = run_folder_.path
        _files.write_json(folder / "bench.json", _bench_report.to_json(limits, results))
        page = _bench_report.html_page(limits, results)
        _files.write_atomic(folder / "report.html", page.encode())
    _bench_report.show(limits, results)
    print(f"report: {folder / 'report.html'}")


def measure_preset(
    settings: Settings, preset: Preset, limits: measure.Ceilings, devices: int
) -> Measured:
    """Measures one preset after warm-up, and its scaling on 1, 2, 4 … `devices`."""
    size, steps = settings.batch_size or preset.batch_size, settings.steps
    workload_ = workload(preset, settings.dtype)
    batch, state = workload_.batch(size), workload_.state()
    program, compile_seconds = measure.compiled(
        train.jit_step(workload_.step), state, batch, workload_.teacher
    )

    def once() -> Any:
        nonlocal state
        state, metrics = program(state, batch, workload_.teacher)
        return state, metrics

    distribution = measure.step_times(once, steps)
    seconds = measure.throughput(once, steps)
    if settings.trace is not None:
        with jax.profiler.trace(str(Path(settings.trace) / preset.name)):
            measure.step_times(once, min(steps, 5), warmup=0)
    path, epoch_seconds = _epoch(workload_, size, steps)
    cost = measure.cost(program)
    return Measured(
        preset=preset.name,
        about=preset.about,
        dtype=settings.dtype,
        batch_size=size,
        teacher_parameters=workload_.parameters[0],
        student_parameters=workload_.parameters[1],
        compile_seconds=compile_seconds,
        steps=distribution,
        seconds=seconds,
        examples_per_second=size / seconds,
        epoch_path=path,
        epoch_seconds=epoch_seconds if path == "scan" else seconds,
        cost=cost,
        memory=measure.memory(program),
        roofline=measure.roofline(cost, seconds, limits),
        scaling=_scaling(workload_, size, steps, devices),
    )


def device_counts(devices: int) -> list[int]:
    """1, 2, 4 … and `devices` itself."""
    powers = [2**k for k in range(devices.bit_length()) if 2**k < devices]
    return [*powers, devices]


def _epoch(work: Workload, size: int, steps: int) -> tuple[str, float]:
    """The path of `jit_epoch`, and its seconds per step if it is one program."""
    state, data = work.state(), work.batch(size * min(steps, 8))
    path = train.epoch_path(work.step, state, data, size, work.teacher)
    if path != "scan":
        return path, 0.0
    rows = np.arange(steps * size, dtype=np.int32) % len(data["labels"])
    index, epoch = jnp.asarray(rows.reshape(steps, size)), train.jit_epoch(work.step)

    def once() -> Any:
        nonlocal state
        state, metrics = epoch(state, data, index, work.teacher)
        return state, metrics

    return path, measure.step_times(once, 3, warmup=1).median / steps


def _scaling(work: Workload, size: int, steps: int, devices: int) -> tuple[Scaled, ...]:
    """The step on growing meshes, with `size` examples per device."""
    if devices == 1:
        return ()
    results: list[Scaled] = []
    for n in device_counts(devices):
        mesh = sharding.make_mesh(data=n, devices=jax.devices()[:n])
        state, teacher = sharding.place(work.state(), mesh), sharding.place(work.teacher, mesh)
        batch = sharding.place_batch(work.batch(n * size), mesh)
        step = train.jit_step(work.step)

        def once(step: Any = step, teacher: Any = teacher, batch: Any = batch) -> Any:
            nonlocal state
            state, metrics = step(state, batch, teacher)
            return state, metrics

        seconds = measure.throughput(once, steps)
        rate = n * size / seconds
        efficiency = rate / n / (results[0].examples_per_second if results else rate)
        results.append(Scaled(n, seconds, rate, efficiency))
    return tuple(results)


def _random(preset: Preset, n: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    if preset.name == "decoder":
        tokens = rng.integers(0, preset.classes, (n, preset.shape[0] + 1))
        tokens = jnp.asarray(tokens, jnp.int32)
        return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    inputs = jnp.asarray(rng.normal(size=(n, *preset.shape)), jnp.float32)
    return {"inputs": inputs, "labels": jnp.asarray(rng.integers(0, preset.classes, n), jnp.int32)}


def _terms(temperature: float) -> Callable[[Inputs], dict[str, Array]]:
    """KD and the labels; for text, at every token, `[B, L]`."""

    def terms(inputs: Inputs) -> dict[str, Array]:
        logits, labels = inputs.student["logits"], inputs.batch["labels"]
        return {
            "kd": losses.kd_kl(logits, inputs.teacher["logits"], temperature=temperature),
            "task": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        }

    return terms


def _mlp(*hidden: int) -> Linen:
    return linen.model(models.mlp(hidden, 10))


def _vit(width: int, layers: int, heads: int) -> Linen:
    return linen.model(models.ViT(width, layers, heads, 4 * width, patch=4, classes=100))


def _decoder(width: int, layers: int, heads: int, vocabulary: int = 8192) -> Linen:
    """GPT-2, with all logits computed at once."""
    config = DecoderConfig(
        vocabulary, width, layers, heads, heads, width // heads, 4 * width, learned_positions=128,
        norm=Norm(1e-5, is_centered=True), has_norm_bias=True, activation=models.gelu_tanh,
        is_gated=False, fuses_qkv=True, has_qkv_bias=True, has_out_bias=True, has_mlp_bias=True,
        is_tied=True,
    )  # fmt: skip
    decoder = models.decoder(config)

    def init(key: Array, inputs: Any) -> Variables:
        return Variables(decoder.init(key), None)

    def logits(params: Any, tokens: Array) -> Array:
        return losses.head_logits(decoder.apply(params, tokens)[0], decoder.head(params))

    return Linen(init, function(logits))
