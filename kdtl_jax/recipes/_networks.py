"""What distillation needs to know of a network: its features in order of depth, and its head.

The models of `kdtl_jax.models` are described here; any other Linen module is read by its outputs,
in natural order of their names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from kdtl_jax import models, trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop import linen, safetensors
from kdtl_jax.methods._method import Head, Models, Setup
from kdtl_jax.train import precision

Pair = tuple[str, str]
_Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Network(NamedTuple):
    """A module as functions, and where its features are."""

    init: Callable[[Array, Any], Variables]
    apply: ModelFn
    features: tuple[str, ...]  # taps, from the input to the head
    last: str  # what the head reads, `[B, width]`; "logits" where the head reads the inputs
    before_activation: Mapping[str, str] = {}
    attention: tuple[str, ...] = ()  # paths of attention modules


class _Taps(NamedTuple):
    """Submodules to capture, and the entries of `Network` beside them."""

    taps: tuple[str, ...]
    features: tuple[str, ...]
    last: str
    before_activation: Mapping[str, str] = {}
    attention: tuple[str, ...] = ()


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
        known.features,
        known.last,
        known.before_activation,
        known.attention,
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
    layers: Sequence[Pair] = (),
) -> Setup:
    """A pair of networks as methods see it.

    Args:
      layers: (student tap, teacher tap) to match; by default the last features of both, then those
        before them, as many as the shallower network has.

    Raises:
      ValueError: if a network's logits are not one per class, or a tap does not exist (the
        existing ones are listed).
    """
    of_student, of_teacher = (shapes(net, batch_size, example) for net in (student, teacher))
    for name, found in (("student", of_student), ("teacher", of_teacher)):
        if "logits" not in found or found["logits"].shape[-1] != classes:
            width = f"{found['logits'].shape[-1]} outputs" if "logits" in found else "no logits"
            raise ValueError(
                f"the {name} has {width}, the data has {classes} classes. Give it one "
                "output per class."
            )
    known = [tap for layer in layers for tap in zip(("student", "teacher"), layer, strict=True)]
    for name, tap in known:
        taps = of_student if name == "student" else of_teacher
        if tap not in taps:
            listed = ", ".join(sorted(taps, key=trees.natural_key))
            raise ValueError(f"the {name} has no tap {tap!r}. It has {listed}.")
    before = {**teacher.before_activation, **student.before_activation}
    clash = [
        tap
        for tap in student.before_activation.keys() & teacher.before_activation.keys()
        if student.before_activation[tap] != teacher.before_activation[tap]
    ]
    stateful = jax.eval_shape(lambda: student.init(jax.random.key(0), example)).model_state

    def of_params(params: Params, inputs: Array) -> Outputs:
        return student.apply(params, None, inputs)[0]

    def of_inputs(inputs: Array) -> Outputs:
        return teacher.apply(*teacher_variables, inputs)[0]

    return Setup(
        classes=classes,
        student=of_student,
        teacher=of_teacher,
        pairs=tuple(layers) or _matched(student.features, teacher.features),
        last=(student.last, teacher.last),
        examples=examples,
        steps=steps,
        teacher_head=_head(teacher, teacher_variables.params),
        student_head=(lambda params: _present(_head(student, params)))
        if student.last != "logits"
        else None,
        before_activation={tap: name for tap, name in before.items() if tap not in clash},
        attention=_matched(student.attention, teacher.attention),
        last_maps=_last_maps(student, teacher, of_student, of_teacher),
        models=None if stateful else Models(of_params, of_inputs),
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


def _matched(student: Sequence[str], teacher: Sequence[str]) -> tuple[Pair, ...]:
    """From the end backwards: the deepest layers belong together whatever the depths."""
    count = min(len(student), len(teacher))
    return tuple(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))


def _last_maps(
    student: Network, teacher: Network, of_student: _Shapes, of_teacher: _Shapes
) -> Pair | None:
    """The deepest features, where they are maps of which both heads read the average."""
    both = ((student, of_student), (teacher, of_teacher))
    if any(
        net.last != "pooled" or not net.features or len(taps[net.features[-1]].shape) != 4
        for net, taps in both
    ):
        return None
    return student.features[-1], teacher.features[-1]


def _head(net: Network, params: Params) -> Head | None:
    if net.last == "logits" or "head" not in params:
        return None
    return Head(params["head"]["kernel"], params["head"].get("bias"))


def _present(head: Head | None) -> Head:
    if head is None:
        raise ValueError("the student's parameters have no 'head'.")
    return head


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
        return _Taps(taps, hidden, hidden[-1] if hidden else "logits", before)
    if isinstance(module, models.CNN):
        blocks = tuple(f"block_{i}" for i in range(len(module.channels)))
        before = {f"block_{i}": f"conv_{i}" for i in range(len(module.channels))}
        return _Taps((r"conv_\d+",), blocks, "pooled", before)
    stages = ("stem", "stage1", "stage2", "stage3")
    if isinstance(module, models.ResNet):
        return _Taps((), stages, "pooled", {f"stage{i}": f"stage{i}_preact" for i in (1, 2, 3)})
    if isinstance(module, models.WideResNet):
        # Stages are sums that no activation has followed yet, but for the last one.
        before = {"stage1": "stage1", "stage2": "stage2", "stage3": "final_norm"}
        return _Taps(("final_norm",), stages, "pooled", before)
    if isinstance(module, models.ViT):
        layers = tuple(f"layers_{i}" for i in range(module.layers))
        taps = (r"layers_\d+", r"layers_\d+/attention/(query|key|value|probs)")
        return _Taps(taps, layers, "pooled", {}, tuple(f"{layer}/attention" for layer in layers))
    return None


def _read(module: nn.Module, example: Any) -> _Taps:
    plain = linen.model(module)
    variables = jax.eval_shape(lambda: plain.init(jax.random.key(0), example))
    outputs, _ = jax.eval_shape(plain.apply, *variables, example)
    features = tuple(sorted(outputs.keys() - {"logits", "pooled"}, key=trees.natural_key))
    flat = [name for name in ("pooled", *reversed(features)) if name in outputs]
    last = next((name for name in flat if len(outputs[name].shape) == 2), "logits")
    return _Taps((), features, last)
