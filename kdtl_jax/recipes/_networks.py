"""What distillation needs to know of a network: its features in order of depth, and its head.

The models of `kdtl_jax.models` are described here; any other Linen module is read by its outputs,
in natural order of their names.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from kdtl_jax import methods, models
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop import linen, safetensors
from kdtl_jax.methods import Layout, Setup
from kdtl_jax.objective import TermsFn
from kdtl_jax.train import precision

Pair = tuple[str, str]


class Network(NamedTuple):
    """A module as functions, and where its features are."""

    init: Callable[[Array, Any], Variables]
    apply: ModelFn
    layout: Layout


class _Taps(NamedTuple):
    """Submodules to capture, and where the features then are."""

    taps: tuple[str, ...]
    layout: Layout


def network(module: nn.Module, example: Any, *, dtype: Any = None) -> Network:
    """Describes a module.

    Args:
      module: an unbound Linen module.
      example: inputs `[1, ...]`, for shapes.
      dtype: compute in this precision; outputs are float32 all the same. None: as it is.

    Raises:
      ValueError: if the module does not take such inputs, or has no `"logits"`.
    """
    known = _described(module) or _read(module, example)
    plain = linen.model(module, taps=known.taps)
    apply = _with_pooled(plain.apply)
    return Network(
        plain.init,
        apply if dtype is None else precision.compute_in(apply, dtype),
        known.layout,
    )


def shapes(net: Network, examples: int, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of all outputs for a batch of so many examples."""
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), example))
    batch = jax.ShapeDtypeStruct((examples, *np.shape(example)[1:]), example.dtype)
    outputs, _ = jax.eval_shape(net.apply, variables.params, variables.model_state, batch)
    return dict(outputs)


def setup(
    student: Network,
    teacher: Network,
    teacher_variables: Variables,
    *,
    example: Any,
    classes: int,
    batch_size: int,
    examples: int,
    steps: int,
    task: TermsFn,
    layers: Sequence[Pair] = (),
) -> Setup:
    """A pair of networks as methods see it; `layers` are matched by depth unless given."""
    return methods.setup(
        student.apply,
        teacher.apply,
        student_variables=jax.eval_shape(lambda: student.init(jax.random.key(0), example)),
        teacher_variables=teacher_variables,
        inputs=jax.ShapeDtypeStruct((batch_size, *np.shape(example)[1:]), example.dtype),
        examples=examples,
        steps=steps,
        classes=classes,
        layers=layers or None,
        student_layout=student.layout,
        teacher_layout=teacher.layout,
        task=task,
    )


def load(path: str, net: Network, example: Any) -> Variables:
    """A network's variables from safetensors, as `tree` stores them.

    Raises:
      OSError: if the file cannot be read.
      ValueError: naming each leaf that is missing, extra or of another shape.
    """
    template = jax.eval_shape(lambda: net.init(jax.random.key(0), example))
    try:
        found = safetensors.load_tree(path, like=tree(template))
    except ValueError as error:
        raise ValueError(f"{path}: {error} Does it hold this model, for these classes?") from None
    found = jax.tree.map(np.array, found)
    if template.model_state is None:
        return Variables(found)
    return Variables(found["params"], {name: found[name] for name in template.model_state})


def tree(variables: Variables) -> PyTree:
    """What a safetensors file of a model holds: parameters, or all collections by name."""
    if variables.model_state is None:
        return variables.params
    return {"params": variables.params, **variables.model_state}


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


def _described(module: nn.Module) -> _Taps | None:
    if isinstance(module, models.MLP):
        hidden = tuple(f"hidden_{i}" for i in range(len(module.widths)))
        before = {f"hidden_{i}": f"dense_{i}" for i in range(len(module.widths))}
        taps = (r"dense_\d+",) if hidden else ()
        return _Taps(taps, Layout(hidden, hidden[-1] if hidden else "logits", before))
    if isinstance(module, models.CNN):
        blocks = tuple(f"block_{i}" for i in range(len(module.channels)))
        before = {f"block_{i}": f"conv_{i}" for i in range(len(module.channels))}
        return _Taps((r"conv_\d+",), Layout(blocks, "pooled", before))
    stages = ("stem", "stage1", "stage2", "stage3")
    if isinstance(module, models.ResNet):
        before = {f"stage{i}": f"stage{i}_preact" for i in (1, 2, 3)}
        return _Taps((), Layout(stages, "pooled", before))
    if isinstance(module, models.WideResNet):
        # Stages are sums that no activation has followed yet, but for the last one.
        before = {"stage1": "stage1", "stage2": "stage2", "stage3": "final_norm"}
        return _Taps(("final_norm",), Layout(stages, "pooled", before))
    if isinstance(module, models.ViT):
        layers = tuple(f"layers_{i}" for i in range(module.layers))
        taps = (r"layers_\d+", r"layers_\d+/attention/(query|key|value|probs)")
        attention = tuple(f"{layer}/attention" for layer in layers)
        return _Taps(taps, Layout(layers, "pooled", {}, attention))
    return None


def _read(module: nn.Module, example: Any) -> _Taps:
    plain = linen.model(module)
    variables = jax.eval_shape(lambda: plain.init(jax.random.key(0), example))
    outputs, _ = jax.eval_shape(plain.apply, *variables, example)
    return _Taps((), methods.layout(outputs))
