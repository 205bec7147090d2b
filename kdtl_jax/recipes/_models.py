"""Models by their text (`mlp:128,64`, `wrn-16-2`), as networks that methods know, and their files.

A model's file is safetensors; its metadata say what it is a file of: the model's text, its classes,
and how its inputs are scaled. `read_about` and `load` are the one reader that all recipes use.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import methods, models, transforms
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.datasets import Splits, Standardizer, read_splits, standardizer
from kdtl_jax.interop import linen, safetensors
from kdtl_jax.recipes._training import in_chunks
from kdtl_jax.recipes.settings import MODEL, Data, UsageError
from kdtl_jax.run import record
from kdtl_jax.train import precision


class Network(NamedTuple):
    """A module as functions, and where its features are."""

    init: Callable[[Array, Any], Variables]
    apply: ModelFn
    layout: methods.Layout


class About(NamedTuple):
    """What a model's file says of itself; None where it says nothing."""

    model: str | None = None
    classes: int | None = None
    scaling: Standardizer | None = None
    names: tuple[str, ...] = ()  # of the classes, where they are not numbers


def module(text: str, classes: int) -> nn.Module:
    """The Flax module that a text names, with `classes` outputs.

    Raises:
      UsageError: listing the forms, if the text is none of them or its numbers make no sense.
    """
    try:
        return models.named(text.strip(), classes)
    except ValueError as error:
        raise UsageError(f"{text!r} is no model: {error} Expected {MODEL}.") from None


def text_of(value: Any) -> str | None:
    """`parse=` of a model's setting: the text itself, once it is known to name a model."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected a model as in mlp:128,64, got {value!r:.80}")
    module(value, 2)
    return value


def network(made: nn.Module, example: Any, *, dtype: Any = None) -> Network:
    """Describes a module.

    Args:
      made: an unbound Linen module.
      example: inputs `[1, ...]`, for shapes.
      dtype: compute in this precision; outputs are float32 all the same. None: as it is.

    Raises:
      ValueError: if the module does not take such inputs.
    """
    taps, layout = _described(made) or ((), None)
    plain = linen.model(made, taps=taps)
    apply = _with_pooled(plain.apply)
    if layout is None:
        variables = jax.eval_shape(lambda: plain.init(jax.random.key(0), jnp.asarray(example)))
        layout = methods.layout(jax.eval_shape(apply, *variables, example)[0])
    lowered = apply if dtype is None else precision.compute_in(apply, dtype)
    return Network(plain.init, lowered, layout)


def abstract(net: Network, example: Any) -> Variables:
    """Shapes of a network's variables."""
    return jax.eval_shape(lambda: net.init(jax.random.key(0), example))


def output_shapes(net: Network, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all outputs for a batch like `example`."""
    return dict(jax.eval_shape(net.apply, *abstract(net, example), example)[0])


def read_about(path: str | None, text: str | None, default: str) -> tuple[str, About]:
    """The model's text, and what its file says: the two may not contradict each other.

    Args:
      path: a model's file, or None if there is none.
      text: what the user says the model is, or None.
      default: the text where nobody says anything.

    Raises:
      UsageError: if the file holds another model than the user says.
      ValueError: if the file does not exist or its metadata are damaged.
    """
    if path is None:
        return text or default, About()
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file.")
    known = safetensors.index(path).metadata
    try:
        mean, scale = (
            None if name not in known else np.asarray(json.loads(known[name]), np.float32)
            for name in ("input_mean", "input_scale")
        )
        classes = int(known["classes"]) if "classes" in known else None
        names = tuple(map(str, json.loads(known.get("class_names", "[]"))))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata are damaged ({error}).") from None
    scaling = None if mean is None or scale is None else Standardizer(mean, scale)
    about = About(known.get("model"), classes, scaling, names)
    if about.model is None:
        return text or default, about
    if text is not None and module(text, 2) != module(about.model, 2):
        raise UsageError(f"{path} holds the model {about.model}, not {text}.")
    return about.model, about


def read_data(settings: Data, about: About, path: str | None) -> tuple[Splits, Standardizer]:
    """The data, scaled as the model's file says, or to mean 0 and deviation 1 of its training part.

    Raises:
      ValueError: if the file is of a model with other classes or inputs.
    """
    raw = read_splits(
        settings.data,
        label=settings.label,
        validation=settings.validation,
        test=settings.test,
        seed=settings.split_seed,
    )
    for notice in raw.train.notices:
        print(f"note: {notice}", file=sys.stderr)
    if about.classes not in (None, raw.train.classes):
        raise ValueError(
            f"{path} is of {about.classes} classes, the data has {raw.train.classes}. Give it data "
            "of its own classes."
        )
    if about.names and raw.train.names and about.names != raw.train.names:
        raise ValueError(
            f"{path} is of the classes {', '.join(about.names)}, the data has "
            f"{', '.join(raw.train.names)}."
        )
    measured = about.scaling or standardizer(raw.train)
    try:
        np.broadcast_shapes(raw.train.inputs.shape, measured.mean.shape, measured.scale.shape)
    except ValueError:
        raise ValueError(
            f"{path} scales inputs of shape {list(measured.mean.shape)}, the data's examples are "
            f"{list(raw.train.inputs.shape[1:])}."
        ) from None
    return Splits(*(measured.apply(part) for part in raw)), measured


def load(path: str, net: Network, example: Any) -> Variables:
    """A network's variables from safetensors, as `tree` stores them.

    Raises:
      OSError: if the file cannot be read.
      ValueError: naming each leaf that is missing, extra, of another shape, or not finite.
    """
    template = abstract(net, example)
    try:
        found = safetensors.load_tree(path, like=tree(template))
    except ValueError as error:
        raise ValueError(f"{path}: {error} Does it hold this model, for these classes?") from None
    found = jax.tree.map(np.array, found)
    record.check_finite(path, found)
    if template.model_state is None:
        return Variables(found)
    return Variables(found["params"], {name: found[name] for name in template.model_state})


def save(path: Path, variables: Variables, about: About, more: Mapping[str, str]) -> None:
    """A model's file, with everything needed to use it."""
    known = {"model": about.model, "classes": about.classes}
    metadata = {name: str(value) for name, value in known.items() if value is not None}
    if about.scaling is not None:
        mean, scale = (json.dumps(x.tolist()) for x in about.scaling)
        metadata |= {"input_mean": mean, "input_scale": scale}
    if about.names:
        metadata["class_names"] = json.dumps(about.names)
    arrays = jax.tree.map(np.asarray, tree(variables))
    safetensors.save(path, arrays, metadata={**metadata, **more})


def tree(variables: Variables) -> PyTree:
    """What a safetensors file of a model holds: parameters, or all collections by name."""
    if variables.model_state is None:
        return variables.params
    return {"params": variables.params, **variables.model_state}


def selected(teacher: Params, student: Params) -> Params:
    """A student filled with evenly spaced units of its teacher, layer by layer.

    A unit keeps its place on both sides: the rows that a layer reads are those that the layer
    before writes.
    """
    return transforms.transfer(
        teacher, student, on_mismatch=transforms.select_uniform, check_finite=False
    )[0]


def outputs(net: Network, variables: Variables, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a frozen network, `[N, ...]` on the host."""
    apply = jax.jit(lambda v, x: dict(net.apply(v.params, v.model_state, x)[0]))
    return in_chunks(lambda x: apply(variables, x), inputs, 512)


def _with_pooled(apply: ModelFn) -> ModelFn:
    """Adds what a transformer's head reads, the class token, as `"pooled"`."""

    def with_pooled(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs, state = apply(params, model_state, inputs, key=key, train=train)
        if "pooled" not in outputs and "last_hidden" in outputs:
            outputs = {**outputs, "pooled": outputs["last_hidden"][:, 0]}
        return outputs, state

    return with_pooled


def _described(made: nn.Module) -> tuple[tuple[str, ...], methods.Layout] | None:
    """Submodules to capture, and the layout, of the models of `kdtl_jax.models`."""
    if isinstance(made, models.MLP):
        hidden = tuple(f"hidden_{i}" for i in range(len(made.widths)))
        before = {f"hidden_{i}": f"dense_{i}" for i in range(len(made.widths))}
        last = hidden[-1] if hidden else "logits"
        return ((r"dense_\d+",) if hidden else ()), methods.Layout(hidden, last, before)
    if isinstance(made, models.CNN):
        blocks = tuple(f"block_{i}" for i in range(len(made.channels)))
        before = {f"block_{i}": f"conv_{i}" for i in range(len(made.channels))}
        return (r"conv_\d+",), methods.Layout(blocks, "pooled", before)
    stages = ("stem", "stage1", "stage2", "stage3")
    if isinstance(made, models.ResNet):
        before = {f"stage{i}": f"stage{i}_preact" for i in (1, 2, 3)}
        return (), methods.Layout(stages, "pooled", before)
    if isinstance(made, models.WideResNet):
        # Stages are sums that no activation has followed yet, but for the last one.
        before = {"stage1": "stage1", "stage2": "stage2", "stage3": "final_norm"}
        return ("final_norm",), methods.Layout(stages, "pooled", before)
    if isinstance(made, models.ViT):
        layers = tuple(f"layers_{i}" for i in range(made.layers))
        attention = tuple(f"{layer}/attention" for layer in layers)
        taps = (r"layers_\d+", r"layers_\d+/attention/(query|key|value|probs)")
        return taps, methods.Layout(layers, "pooled", {}, attention)
    return None
