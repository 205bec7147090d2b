"""Computes a teacher's outputs for a training set once and stores them on disk.

The cache records its weights, model, data and classes, and can be read only for these. An
interrupted cache is completed; a damaged one is repaired.

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
from kdtl_jax.datasets import Dataset
from kdtl_jax.interop import networks, sources
from kdtl_jax.interop.networks import Network
from kdtl_jax.losses import TopK
from kdtl_jax.recipes import _data, _models, _progress, _user_code
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import scores, teacher_cache
from kdtl_jax.train import precision

FIDELITY_EXAMPLES = 1024  # examples in the fidelity of a lower precision
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
    train, net, variables, identity = load_teacher(settings)
    inputs, precision_name = train.inputs, settings.precision
    taps = settings.taps
    if taps == ("all",):
        taps = tuple(sorted(networks.output_shapes(net, jnp.asarray(inputs[:1]))))
    apply, lowered = in_precision(net.apply, variables, precision_name)
    if precision_name != "float32":
        print_fidelity(net.apply, variables, apply, lowered, inputs, precision_name)
    with _progress.show_progress() as say:
        seldom = _progress.throttle(say, LINE_SECONDS)

        def report(done: int, total: int) -> None:
            seldom(f"{done:,} of {total:,} examples", done == total)
            say.bar("examples", done, total)

        plan = teacher_cache.write(
            folder,
            apply,
            lowered,
            {"inputs": inputs},
            batch_size=settings.batch_size,
            # The data's digest covers the scaling of inputs.
            preprocessing={} if precision_name == "float32" else {"precision": precision_name},
            taps=taps,
            top_k=settings.top_k,
            temperature=settings.temperature,
            dtype=settings.dtype,
            weights=teacher_cache.digest(variables),
            progress=report,
            **identity,
        )
    cache = teacher_cache.open_cache(folder, expect=None, contents=False)
    print_plan(folder, plan)
    if "logits" in taps and train.kind == "classes":
        accuracy = scores.accuracy(cached_classes(cache), train.labels)
        print(f"teacher: {100 * accuracy:.1f}% of these examples right")
    return 0


def verify(folder: Path, settings: Settings) -> int:
    """Verifies the cache's bytes and, if weights are given, the record of its inputs."""
    problems = teacher_cache.verify(folder)
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        print(f"kdtl cache: write {folder} again to compute what is damaged.", file=sys.stderr)
        return 1
    expect, provenance = None, ""
    if settings.teacher_weights is not None:
        train, _, variables, made_of = load_teacher(settings)
        expect = teacher_cache.fingerprint(variables, {"inputs": train.inputs}, **made_of)
        # The form may be any; network, weights and data must match.
        any_form = dict.fromkeys(("taps", "logits", "dtype", "preprocessing", "views"))
        expect, provenance = expect._replace(**any_form), ", made by these weights from these data"
    cache = teacher_cache.open_cache(folder, expect=expect, contents=False)
    print_plan(folder, cache.plan)
    print(f"whole: every byte is as it was written{provenance}")
    return 0


def load_teacher(settings: Settings) -> tuple[Dataset, Network, Variables, dict[str, Any]]:
    """The training part, the network, its variables, and the identity that the cache records."""
    path = settings.teacher_weights
    if path is None:
        raise UsageError(
            "--teacher-weights: name the teacher's safetensors file, for example "
            "runs/distill/teacher.safetensors."
        )
    if settings.top_k is None and settings.temperature != 1:
        raise UsageError("--temperature needs --top-k: whole logits have none.")
    source = _models.open_source(path, settings.teacher, "mlp:128,64")
    train, text = _data.read_data(settings, source)[0].train, str(source.about.model)
    example = jnp.asarray(train.inputs[:1])
    net = _models.make_network(text, train.classes, example)
    _user_code.check_logits("--teacher", text, net, train)
    identity = {"model": _models.identity(text), "classes": train.class_names()}
    return train, net, sources.variables(source, networks.abstract(net, example)), identity


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
    examples = inputs[:FIDELITY_EXAMPLES]
    reference, logits = (
        jax.jit(fn)(v.params, v.model_state, examples)[0].get("logits")
        for fn, v in ((model, variables), (lower_model, lowered))
    )
    if reference is None or logits is None:
        return
    fidelity = precision.fidelity(logits, reference)
    print(
        f"{name} against float32 on {len(examples):,} examples: same class in "
        f"{100 * float(fidelity.agreement):.2f}%, KL {float(fidelity.kl):.2g} nats, largest logit "
        f"error {float(fidelity.largest_error):.2g}"
    )


def cached_classes(cache: teacher_cache.Cache) -> np.ndarray:
    """The class that the cached teacher predicts for every example."""
    classes = []
    for start in range(0, cache.plan.size, 4096):
        rows = np.arange(start, min(start + 4096, cache.plan.size))
        logits = teacher_cache.rows(cache, rows)["logits"]
        is_top_k = isinstance(logits, TopK)
        classes.append(
            logits.indices[..., 0] if is_top_k else scores.predicted(jnp.asarray(logits))
        )
    return np.concatenate([np.asarray(part) for part in classes])


def print_plan(folder: Path, plan: teacher_cache.Plan) -> None:
    """Prints what the folder holds."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    form = "" if plan.top_k is None else f", logits as {plan.fingerprint.logits}"
    print(
        f"{folder}: {plan.size:,} examples, {', '.join(plan.fingerprint.taps or ())} in "
        f"{plan.fingerprint.dtype}{form}, {size:,} bytes"
    )
