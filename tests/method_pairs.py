"""Small pairs of models of every kind, as published methods see them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import methods
from kdtl_jax._types import ModelFn, Outputs, Params, Variables
from kdtl_jax.interop import linen
from kdtl_jax.methods import Layout, Setup
from kdtl_jax.models import ViT

BATCH, CLASSES, EXAMPLES, STEPS = 6, 5, 20, 240
# Compiling is all that these tests cost, and of it the default generator would be most.
KEYS = "unsafe_rbg"
QUICKLY: Any = {
    "compiler_options": {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
}

Model = Callable[[Params, Array], Outputs]


def dense(params: Mapping[str, Array], x: Array) -> Array:
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape)


def mlp(params: Params, x: Array) -> Outputs:
    """Two hidden layers with their values before the activation."""
    outputs = {}
    for i in range(2):
        outputs[f"dense_{i}"] = dense(params[f"layer_{i}"], x)
        x = outputs[f"hidden_{i}"] = jax.nn.relu(outputs[f"dense_{i}"])
    return {**outputs, "logits": dense(params["head"], x)}


def cnn(params: Params, x: Array) -> Outputs:
    """Pixelwise layers and a 2x2 pool between them: maps of 4x4 and 2x2."""
    outputs = {}
    for i in range(2):
        if i:
            x = jnp.mean(x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1), (2, 4))
        outputs[f"conv_{i}"] = dense(params[f"layer_{i}"], x)
        x = outputs[f"block_{i}"] = jax.nn.relu(outputs[f"conv_{i}"])
    pooled = jnp.mean(x, axis=(1, 2))
    return {**outputs, "pooled": pooled, "logits": dense(params["head"], pooled)}


def layers(seed: int, *sizes: int) -> dict[str, dict[str, Array]]:
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    names = (*(f"layer_{i}" for i in range(len(sizes) - 2)), "head")
    return {
        name: {"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros((m,))}
        for name, key, n, m in zip(names, keys, sizes, sizes[1:], strict=False)
    }


def as_model(model: Model) -> ModelFn:
    def apply(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ):
        return model(params, inputs), model_state

    return apply


class Pair(NamedTuple):
    """A student, its teacher's outputs, and one batch."""

    model: Model
    student: Params
    teacher: Outputs
    batch: dict[str, Array]
    setup: Setup


def pair_of(
    student_model: Model,
    teacher_model: Model,
    student: Params,
    teacher: Params,
    x: Array,
    layout: Layout,
    labels: Array | None = None,
    exclusive: bool = True,
) -> Pair:
    order = jnp.arange(BATCH, dtype=jnp.int32)
    labels = order % CLASSES if labels is None else labels
    batch = {"inputs": x, "labels": labels, "index": order + 3}
    described = methods.setup(
        as_model(student_model),
        as_model(teacher_model),
        student_variables=Variables(student),
        teacher_variables=Variables(teacher),
        inputs=x,
        examples=EXAMPLES,
        steps=STEPS,
        exclusive=exclusive,
        student_layout=layout,
        teacher_layout=layout,
    )
    outputs = jax.jit(teacher_model)(teacher, x)
    return Pair(student_model, student, dict(outputs), batch, described)


@functools.cache
def mlps() -> Pair:
    return pair_of(
        mlp,
        mlp,
        layers(0, 7, 8, 6, CLASSES),
        layers(1, 7, 10, 12, CLASSES),
        jax.random.normal(jax.random.key(2), (BATCH, 7)),
        Layout(
            ("hidden_0", "hidden_1"), "hidden_1", {"hidden_0": "dense_0", "hidden_1": "dense_1"}
        ),
    )


def sigmoid_mlps(labels: int) -> Pair:
    """One logit per label, or a single logit."""
    shape = (BATCH, labels) if labels > 1 else (BATCH,)
    return pair_of(
        mlp,
        mlp,
        layers(0, 7, 8, 6, labels),
        layers(1, 7, 10, 12, labels),
        jax.random.normal(jax.random.key(2), (BATCH, 7)),
        Layout(("hidden_0", "hidden_1"), "hidden_1"),
        jax.random.bernoulli(jax.random.key(3), 0.5, shape).astype(jnp.float32),
        exclusive=False,
    )


@functools.cache
def cnns() -> Pair:
    return pair_of(
        cnn,
        cnn,
        layers(0, 3, 4, 6, CLASSES),
        layers(1, 3, 5, 8, CLASSES),
        jax.random.normal(jax.random.key(2), (BATCH, 4, 4, 3)),
        Layout(("block_0", "block_1"), "pooled", {"block_0": "conv_0", "block_1": "conv_1"}),
    )


@functools.cache
def vits() -> Pair:
    """Equal heads and patches, unequal widths."""
    taps = (r"layers_\d", r"layers_\d/attention/(probs|query|key|value)")
    x = jax.random.normal(jax.random.key(2), (BATCH, 4, 4, 1))

    def vit(width: int, seed: int) -> tuple[Model, Params]:
        module = ViT(width=width, layers=2, heads=2, hidden=8, patch=2, classes=CLASSES)
        model = linen.model(module, taps=taps)

        def apply(params: Params, x: Array) -> Outputs:
            # The model's own promotions are not the subject here.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                outputs, _ = model.apply(params, None, x)
            return {**outputs, "pooled": outputs["last_hidden"][:, 0]}

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return apply, jax.jit(model.init)(jax.random.key(seed), x).params

    (student_model, student), (teacher_model, teacher) = vit(4, 0), vit(6, 1)
    names = ("layers_0", "layers_1")
    return pair_of(
        student_model,
        teacher_model,
        student,
        teacher,
        x,
        Layout(names, "pooled", {}, tuple(f"{name}/attention" for name in names)),
    )
