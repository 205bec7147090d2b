"""Writes a student as one file for other runtimes: StableHLO, or ONNX if jax2onnx is installed.

    kdtl export runs/distill/students/kd.safetensors --out kd.stablehlo

The exported model takes raw inputs (it includes the scaling) in batches of any size and returns
logits or, for regression, numbers in the units of the targets. In JAX:
`jax.export.deserialize(Path("kd.stablehlo").read_bytes()).call(inputs)`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _files
from kdtl_jax.interop.model_files import Model
from kdtl_jax.recipes import _inputs
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting

COARSEST = 0.01  # of a deviation: the largest rounding of inputs
PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLES = """
  kdtl export runs/distill/students/kd.safetensors --out kd.stablehlo
  kdtl export runs/distill/students/kd.safetensors --out kd.onnx --format onnx

StableHLO needs pip install 'kdtl_jax[export]', ONNX pip install 'kdtl_jax[onnx]'.
"""


@dataclass(frozen=True)
class Settings(_inputs.TrainedModelSettings, _inputs.Written):
    """Settings of `kdtl export`."""

    out: str | None = setting(None, "the file to write", metavar="FILE")
    format: Literal["stablehlo", "onnx"] = setting("stablehlo", "format of the file")
    batch: int | None = setting(
        None, "examples per call; default: any number", metavar="N", least=1
    )
    platforms: tuple[str, ...] = setting(
        PLATFORMS, "platforms that StableHLO is exported for", metavar="NAME,...", parse=types.names
    )
    shape: tuple[int, ...] | None = setting(
        None, "shape of one input, as in 8,8,1, for a file that does not record it",
        metavar="N,...", parse=lambda value: None if value is None else types.layer_numbers(value),
    )  # fmt: skip


def run(settings: Settings) -> int:
    """Exports the model to a file."""
    if settings.student is None or settings.out is None:
        raise UsageError(f"name STUDENT and --out, for example: {EXAMPLES.strip().splitlines()[0]}")
    if unknown := set(settings.platforms) - {*PLATFORMS, "rocm"}:
        names = ", ".join((*PLATFORMS, "rocm"))
        raise UsageError(f"--platforms: {min(unknown)!r} is not one of {names}")
    if Path(settings.out).suffix == ".onnx" and settings.format != "onnx":
        raise UsageError(f"--out {settings.out}: for ONNX, pass --format onnx")
    _inputs.check_out(settings)
    model = _inputs.model_of(settings)
    shape = model.about.shape or settings.shape
    if shape is None:
        raise UsageError(
            f"{settings.student} does not say the shape of its inputs: give it, as in --shape 8,8,1"
        )
    if settings.shape not in (None, shape):
        raise UsageError(
            f"--shape {','.join(map(str, settings.shape or ()))}: {settings.student} takes inputs "
            f"{list(shape)}. Leave the flag out."
        )
    check_precision(settings.student, model)
    out = Path(settings.out)
    if settings.format == "onnx":
        content = onnx(model.outputs, shape, settings.batch)
    else:
        content = stablehlo(model, shape, settings.batch, settings.platforms)
    _inputs.check_out(settings)  # another command may have written there in the meantime
    _files.write_atomic(out, content)
    batch = "N" if settings.batch is None else settings.batch
    inputs = ", ".join(map(str, (batch, *shape)))
    outputs = "numbers" if _inputs.target_kind(model) == "numbers" else "logits"
    print(
        f"{out}: float32 [{inputs}] -> {outputs} [{batch}, {model.about.classes}], "
        f"{out.stat().st_size:,} bytes",
        file=sys.stderr,
    )
    return 0


def check_precision(path: str, model: Model) -> None:
    """Raises ValueError if the float32 inputs of an exported model would lose their variation."""
    scaling, form = model.about.scaling, model.about.preprocessing
    if scaling is None:
        return
    mean, scale = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in scaling))
    rounding = np.finfo(np.float32).eps * np.abs(mean)
    indices = np.flatnonzero((rounding > COARSEST * scale).ravel())
    if indices.size:
        index = int(indices[0])
        columns = () if form is None else form.columns
        subject = (
            f"the column {columns[index].name!r:.80}" if len(columns) == mean.size else "an input"
        )
        raise ValueError(
            f"{path}: {subject} lies at {mean.ravel()[index]:.6g} with a deviation of "
            f"{scale.ravel()[index]:.3g}, which float32 rounds away, and an exported model takes "
            "float32. Use kdtl predict, or train on differences from a number nearby."
        )


def stablehlo(
    model: Model, shape: tuple[int, ...], batch: int | None, platforms: tuple[str, ...] = PLATFORMS
) -> bytes:
    """The model, serialized by `jax.export`.

    Raises:
      ImportError: if flatbuffers, which jax.export needs, is not installed.
      ValueError: if the model cannot run on batches of any size, or a platform is unknown.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("StableHLO needs flatbuffers: pip install 'kdtl_jax[export]'.")
    rows = jax.export.symbolic_shape("n")[0] if batch is None else batch
    inputs = jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    try:
        exported = jax.export.export(jax.jit(model.outputs), platforms=platforms)(inputs)
        return bytes(exported.serialize())
    # NotImplementedError: from JAX, for primitives that it cannot serialize.
    except (ValueError, TypeError, NotImplementedError, jax.errors.JAXTypeError) as error:
        message = " ".join(str(error).split())[:300].rstrip(".")
        hint = "" if batch else (
            " A model that needs to know its batch is exported with --batch; len(x) does, "
            "x.shape[0] does not."
        )  # fmt: skip
        raise ValueError(f"it cannot be exported: {message}.{hint}") from error


def onnx(outputs: Callable[[Any], Any], shape: tuple[int, ...], batch: int | None) -> bytes:
    """The model as ONNX, converted by jax2onnx.

    Raises:
      ImportError: if jax2onnx is not installed.
      ValueError: if it does not support one of the model's operations.
    """
    try:
        jax2onnx = importlib.import_module("jax2onnx")
    except ImportError:
        raise ImportError(
            "ONNX needs jax2onnx: pip install 'kdtl_jax[onnx]'. The default is StableHLO."
        ) from None
    try:
        model = jax2onnx.to_onnx(outputs, [(batch or "B", *shape)])
    except Exception as error:  # a converter may raise anything
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"jax2onnx cannot convert it: {type(error).__name__}: {message}"
        ) from error
    return model.SerializeToString()
