"""Computes a teacher's outputs for a training set once and keeps them on disk.

The cache records what it was made from (weights, model, data, classes) and refuses to be read for
anything else. An interrupted cache is completed; a damaged one is repaired.

    kdtl cache --teacher-weights runs/distill/teacher.safetensors --taps all
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax._types import ModelFn, Variables
from kdtl_jax.datasets import KINDS, Dataset
from kdtl_jax.interop import networks, sources
from kdtl_jax.interop.networks import Network
from kdtl_jax.losses import TopK
from kdtl_jax.recipes import _data, _models, _progress, _user_code
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import scores, teacher_cache
from kdtl_jax.train import precision

COMPARED = 1024  # examples behind the fidelity of a lower precision
LINE_SECONDS = 5.0  # between lines of progress
EXAMPLES = """
  kdtl cache --teacher-weights runs/distill/teacher.safetensors
  kdtl cache --data mnist/ --teacher cnn:32,64 --teacher-weights teacher.safetensors \\
      --top-k 5 --dtype float16 --out runs/cache
  kdtl cache --out runs/cache --verify
"""


@dataclass(frozen=True)
class Settings(types.Data):
    """Settings of `kdtl cache`."""

    teacher: str | None = setting(
        None, f"{types.MODEL}; default: the model in --teacher-weights, or mlp:128,64",
        metavar="MODEL", parse=_models.text_of,
    )  # fmt: skip
    teacher_weights: str | None = setting(
        None, "the teacher's safetensors file, as written by kdtl distill", metavar="FILE"
    )
    taps: tuple[str, ...] = setting(
        ("logits",), "outputs to store, or all, as kdtl distill --teacher-cache reads them",
        metavar="NAME,...", parse=types.names,
    )  # fmt: skip
    top_k: int | None = setting(
        None, "store only the K most likely classes and the mass of the rest", metavar="K", least=1
    )
    temperature: float = types.positive_rate(
        1.0, "temperature of the softmax that is cut to K classes"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "dtype of the stored outputs"
    )
    precision: Literal["float32", "bfloat16", "float16", "int8"] = setting(
        "float32", "precision of the teacher; int8 applies to its weights only"
    )
    batch_size: int = setting(256, "examples per call of the teacher", metavar="N", least=1)
    out: str = setting(
        "runs/teacher_cache",
        "folder of the cache; an unfinished one is completed",
        metavar="FOLDER",
    )
    verify: bool = setting(
        False, "compute nothing: check every byte in --out against its SHA-256 and, with "
        "--teacher-weights, what it was made from",
    )  # fmt: skip


def run(settings: Settings) -> int:
    """Writes, completes or verifies a cache; returns the exit code."""
    folder = Path(settings.out)
    if settings.verify:
        return verify(folder, settings)
    train, net, variables, made_of = teacher(settings)
    inputs, lower = train.inputs, settings.precision
    taps = settings.taps
    if taps == ("all",):
        taps = tuple(sorted(networks.output_shapes(net, jnp.asarray(inputs[:1]))))
    apply, lowered = in_precision(net.apply, variables, lower)
    if lower != "float32":
        print_fidelity(net.apply, variables, apply, lowered, inputs, lower)
    with _progress.shown() as say:
        seldom = _progress.seldom(say, LINE_SECONDS)

        def report(done: int, total: int) -> None:
            seldom(f"{done:,} of {total:,} examples", done == total)
            say.bar("examples", done, total)

        plan = teacher_cache.write(
            folder,
            apply,
            lowered,
            {"inputs": inputs},
            batch_size=settings.batch_size,
            # How inputs are scaled is in the data's digest.
            preprocessing={} if lower == "float32" else {"precision": lower},
            taps=taps,
            top_k=settings.top_k,
            temperature=settings.temperature,
            dtype=settings.dtype,
            weights=teacher_cache.digest(variables),
            progress=report,
            **made_of,
        )
    cache = teacher_cache.open_cache(folder, expect=None, contents=False)
    print_plan(folder, plan)
    if "logits" in taps and train.kind == "classes":
        right = scores.accuracy(most_likely(cache), train.labels)
        print(f"teacher: {100 * right:.1f}% of these examples right")
    return 0


def verify(folder: Path, settings: Settings) -> int:
    """Compares the cache's bytes and, if weights are given, what it was made from."""
    problems = teacher_cache.verify(folder)
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        print(f"kdtl cache: write {folder} again to compute what is damaged.", file=sys.stderr)
        return 1
    made_from = ""
    if settings.teacher_weights is not None:
        train, _, variables, made_of = teacher(settings)
        expect = teacher_cache.fingerprint(variables, {"inputs": train.inputs}, **made_of)
        # The form may be any; network, weights and data must match.
        form = dict.fromkeys(("taps", "logits", "dtype", "preprocessing", "views"))
        teacher_cache.open_cache(folder, expect=expect._replace(**form), contents=False)
        made_from = ", made by these weights from these data"
    cache = teacher_cache.open_cache(folder, expect=None, contents=False)
    print_plan(folder, cache.plan)
    print(f"whole: every byte is as it was written{made_from}")
    return 0


def teacher(settings: Settings) -> tuple[Dataset, Network, Variables, dict[str, Any]]:
    """The training part, the network, its variables, and the cache's name for the network."""
    path = settings.teacher_weights
    if path is None:
        raise UsageError(
            "--teacher-weights: name the teacher's safetensors file, for example "
            "runs/distill/teacher.safetensors."
        )
    source = _models.opened(path, settings.teacher, "mlp:128,64")
    train, text = _data.read_data(settings, source, kinds=KINDS)[0].train, str(source.about.model)
    example = jnp.asarray(train.inputs[:1])
    net = _models.described(text, train.classes, example)
    _user_code.check_logits("--teacher", text, net, train)
    made_of = {"model": _models.identity(text), "classes": train.class_names()}
    return train, net, sources.variables(source, networks.abstract(net, example)), made_of


def in_precision(model: ModelFn, variables: Variables, name: str) -> tuple[ModelFn, Variables]:
    """The teacher in a lower precision."""
    if name == "float32":
        return model, variables
    if name == "int8":
        lowered = precision.quantize(variables.params)
        return precision.with_int8(model), Variables(lowered, variables.model_state)
    return precision.compute_in(model, jnp.dtype(name)), variables


def print_fidelity(
    model: ModelFn,
    variables: Variables,
    lower_model: ModelFn,
    lowered: Variables,
    inputs: np.ndarray,
    name: str,
) -> None:
    """Prints how well the teacher in a lower precision reproduces its float32 logits."""
    few = inputs[:COMPARED]
    reference, found = (
        jax.jit(fn)(v.params, v.model_state, few)[0].get("logits")
        for fn, v in ((model, variables), (lower_model, lowered))
    )
    if reference is None or found is None:
        return
    measured = precision.fidelity(found, reference)
    print(
        f"{name} against float32 on {len(few):,} examples: same class in "
        f"{100 * float(measured.agreement):.2f}%, KL {float(measured.kl):.2g} nats, largest logit "
        f"error {float(measured.largest_error):.2g}"
    )


def most_likely(cache: teacher_cache.Cache) -> np.ndarray:
    """The class that the cached teacher predicts for every example."""
    found = []
    for start in range(0, cache.plan.size, 4096):
        rows = np.arange(start, min(start + 4096, cache.plan.size))
        logits = teacher_cache.rows(cache, rows)["logits"]
        cut = isinstance(logits, TopK)
        found.append(logits.indices[..., 0] if cut else scores.predicted(jnp.asarray(logits)))
    return np.concatenate([np.asarray(part) for part in found])


def print_plan(folder: Path, plan: teacher_cache.Plan) -> None:
    """What the folder holds."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    form = "" if plan.top_k is None else f", logits as {plan.fingerprint.logits}"
    print(
        f"{folder}: {plan.size:,} examples, {', '.join(plan.fingerprint.taps or ())} in "
        f"{plan.fingerprint.dtype}{form}, {size:,} bytes"
    )
