"""Networks for methods: a model's initialization, its function, and the layout of its features.

    net = networks.network(models.mlp((64, 32), 10), example)
    variables = net.init(key, example)

The models of `kdtl_jax.models` expose all their features; other modules expose what they return.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import methods, models
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop import linen
from kdtl_jax.train import precision

BATCH = 256  # rows that `in_batches` computes at once, at most


class Network(NamedTuple):
    """A module as functions, with the layout of its features."""

    init: Callable[[Array, Any], Variables]
    apply: ModelFn
    layout: methods.Layout


def network(module: nn.Module, example: Any, *, dtype: Any = None) -> Network:
    """Describes a module.

    Args:
      module: an unbound Linen module.
      example: inputs `[1, ...]`, for shapes.
      dtype: the precision to compute in; outputs are always float32. None leaves it unchanged.

    Raises:
      ValueError: if the module does not accept such inputs.
    """
    taps, layout = _describe(module) or ((), None)
    adapted = linen.model(module, taps=taps)
    apply = _with_pooled(adapted.apply)
    if layout is None:
        variables = jax.eval_shape(lambda: adapted.init(jax.random.key(0), jnp.asarray(example)))
        layout = methods.layout(apply, variables, example)
    run = apply if dtype is None else precision.compute_in(apply, dtype)
    return Network(adapted.init, run, layout)


def abstract(net: Network, example: Any) -> Variables:
    """Shapes of a network's variables."""
    return jax.eval_shape(lambda: net.init(jax.random.key(0), example))


def output_shapes(net: Network, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all outputs for a batch like `example`."""
    return dict(jax.eval_shape(net.apply, *abstract(net, example), example)[0])


def _with_pooled(apply: ModelFn) -> ModelFn:
    """Adds the class token, the input of a transformer's head, as `"pooled"`."""

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


def _describe(module: nn.Module) -> tuple[tuple[str, ...], methods.Layout] | None:
    """Submodules to capture, and the layout, of the models of `kdtl_jax.models`."""
    if isinstance(module, models.MLP):
        hidden = tuple(f"hidden_{i}" for i in range(len(module.widths)))
        preactivations = {f"hidden_{i}": f"dense_{i}" for i in range(len(module.widths))}
        last = hidden[-1] if hidden else "logits"
        return ((r"dense_\d+",) if hidden else ()), methods.Layout(hidden, last, preactivations)
    if isinstance(module, models.CNN):
        blocks = tuple(f"block_{i}" for i in range(len(module.channels)))
        preactivations = {f"block_{i}": f"conv_{i}" for i in range(len(module.channels))}
        return (r"conv_\d+",), methods.Layout(blocks, "pooled", preactivations)
    stages = ("stem", "stage1", "stage2", "stage3")
    if isinstance(module, models.ResNet):
        preactivations = {f"stage{i}": f"stage{i}_preact" for i in (1, 2, 3)}
        return (), methods.Layout(stages, "pooled", preactivations)
    if isinstance(module, models.WideResNet):
        # Except for the last one, stages are sums that no activation has followed yet.
        preactivations = {"stage1": "stage1", "stage2": "stage2", "stage3": "final_norm"}
        return ("final_norm",), methods.Layout(stages, "pooled", preactivations)
    if isinstance(module, models.ViT):
        layers = tuple(f"layers_{i}" for i in range(module.layers))
        attention = tuple(f"{layer}/attention" for layer in layers)
        taps = (r"layers_\d+", r"layers_\d+/attention/(query|key|value|probs)")
        return taps, methods.Layout(layers, "pooled", {}, attention)
    return None


def in_batches(
    run: Callable[[Any], Array], inputs: np.ndarray, classes: int, batch: int = BATCH
) -> np.ndarray:
    """`run` over `[N, ...]` in padded batches of a power of two, so few shapes are compiled."""
    parts = [np.zeros((0, classes), np.float32)]
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        size = min(batch, 1 << (len(part) - 1).bit_length())
        rows = np.minimum(np.arange(size), len(part) - 1)
        parts.append(np.asarray(run(part[rows]), np.float32)[: len(part)])
    return np.concatenate(parts)
