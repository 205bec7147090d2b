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
class Settings(_inputs.Trained, _inputs.Written):
    """What `kdtl export` reads and writes."""

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
    """Writes the file."""
    if settings.student is None or settings.out is None:
        raise UsageError(f"name STUDENT and --out, for example: {EXAMPLES.strip().splitlines()[0]}")
    if unknown := set(settings.platforms) - {*PLATFORMS, "rocm"}:
        known = ", ".join((*PLATFORMS, "rocm"))
        raise UsageError(f"--platforms: {min(unknown)!r} is not one of {known}")
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
        made = onnx(model.outputs, shape, settings.batch)
    else:
        made = stablehlo(model, shape, settings.batch, settings.platforms)
    _inputs.check_out(settings)  # another command may have written there in the meantime
    _files.write_atomic(out, made)
    first = "N" if settings.batch is None else settings.batch
    inputs = ", ".join(map(str, (first, *shape)))
    what = "numbers" if _inputs.target_kind(model) == "numbers" else "logits"
    print(
        f"{out}: float32 [{inputs}] -> {what} [{first}, {model.about.classes}], "
        f"{out.stat().st_size:,} bytes",
        file=sys.stderr,
    )
    return 0


def check_precision(path: str, model: Model) -> None:
    """Raises ValueError if float32, which an exported model takes, rounds its inputs away."""
    scaling, form = model.about.scaling, model.about.preprocessing
    if scaling is None:
        return
    mean, scale = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in scaling))
    rounding = np.finfo(np.float32).eps * np.abs(mean)
    lost = np.flatnonzero((rounding > COARSEST * scale).ravel())
    if lost.size:
        at = int(lost[0])
        columns = () if form is None else form.columns
        which = f"the column {columns[at].name!r:.80}" if len(columns) == mean.size else "an input"
        raise ValueError(
            f"{path}: {which} lies at {mean.ravel()[at]:.6g} with a deviation of "
            f"{scale.ravel()[at]:.3g}, which float32 rounds away, and an exported model takes "
            "float32. Use kdtl predict, or train on differences from a number nearby."
        )


def stablehlo(
    model: Model, shape: tuple[int, ...], batch: int | None, platforms: tuple[str, ...] = PLATFORMS
) -> bytes:
    """The model as `jax.export` serializes it.

    Raises:
      ImportError: if flatbuffers, which jax.export needs, is not installed.
      ValueError: if the model cannot run on batches of any size, or a platform is not known.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("StableHLO needs flatbuffers: pip install 'kdtl_jax[export]'.")
    rows = jax.export.symbolic_shape("n")[0] if batch is None else batch
    inputs = jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    try:
        found = jax.export.export(jax.jit(model.outputs), platforms=platforms)(inputs)
        return bytes(found.serialize())
    # NotImplementedError: from JAX, for primitives that it cannot serialize.
    except (ValueError, TypeError, NotImplementedError, jax.errors.JAXTypeError) as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        hint = "" if batch else (
            " A model that needs to know its batch is exported with --batch; len(x) does, "
            "x.shape[0] does not."
        )  # fmt: skip
        raise ValueError(f"it cannot be exported: {said}.{hint}") from error


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
        made = jax2onnx.to_onnx(outputs, [(batch or "B", *shape)])
    except Exception as error:  # whatever a converter raises
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"jax2onnx cannot convert it: {type(error).__name__}: {said}") from error
    return made.SerializeToString()
