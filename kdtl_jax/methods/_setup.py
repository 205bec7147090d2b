"""The input of every method: the shapes of two models, and where their features are."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _jaxprs, _model_functions, _numerics, objective, trees
from kdtl_jax._types import ModelFn, Outputs, Params, Variables
from kdtl_jax.objective import Inputs, TermsFn

Pair = tuple[str, str]  # (student tap, teacher tap)
Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Head(NamedTuple):
    """A linear classifier: `features @ kernel + bias`."""

    kernel: Array  # [features, classes]
    bias: Array | None = None  # [classes]


class Layout(NamedTuple):
    """The features of a network, as names of its outputs.

    `layout` finds them for networks that follow the usual names.
    """

    features: tuple[str, ...]  # from the input to the head
    last: str = "logits"  # the head's input, `[B, width]`; "logits" if that is not tapped
    before_activation: Mapping[str, str] = {}  # a feature -> the same layer before its activation
    # Modules tapped as path/query, path/key, path/value, path/probs.
    attention: tuple[str, ...] = ()
    head: Callable[[Params], Head] | None = None  # None: the parameters' own "head"


class Models(NamedTuple):
    """Both networks as functions, for losses on their derivatives."""

    student: Callable[[Params, Array], Outputs]  # of the student's parameters and inputs
    teacher: Callable[[Array], Outputs]


class Setup(NamedTuple):
    """Everything that a method reads when it is built; made by `setup`.

    Batches hold `"inputs"`, `"labels"` and, for methods with a bank, `"index"` `[B]`, the positions
    of the examples in the training set.
    """

    classes: int
    student: Shapes  # outputs by tap, with the batch axis: "logits" and every feature
    teacher: Shapes
    pairs: tuple[Pair, ...]  # matched layers, in order of depth
    last: Pair  # the heads' inputs, `[B, width]`
    examples: int  # of the training set
    steps: int  # of the whole run
    task: TermsFn = objective.classification
    exclusive: bool = True  # whether classes are mutually exclusive (softmax or sigmoid)
    teacher_head: Head | None = None
    student_head: Callable[[Params], Head] | None = None
    last_maps: Pair | None = None  # maps whose averages are `last`, if both networks pool
    before_activation: Mapping[Pair, Pair] = {}  # a matched pair -> the same before activation
    attention: tuple[Pair, ...] = ()  # paths of matched attention modules
    models: Models | None = None
    inputs: Any = None  # a batch's, abstract
    params: Params = None  # the student's, abstract


def check_setup(setup: Any) -> None:
    """Raises TypeError unless `setup` is a `Setup`."""
    if not isinstance(setup, Setup):
        received = getattr(setup, "__name__", type(setup).__name__)
        raise TypeError(
            "setup must be what methods.setup(student, teacher, ...) returns for a pair of models, "
            f"got {received}."
        )


def multi_label(inputs: Inputs) -> dict[str, Array]:
    """The task of sigmoid heads: `{"task": mean over classes of the binary cross-entropy}`.

    `batch["labels"]` is 0 or 1 per logit (or in between), `[B, classes]`; `[B]` for a head with one
    logit. Other numbers raise ValueError; under `jit` they give NaN, with gradient 0.
    """
    logits, labels, real = inputs.student["logits"], inputs.batch["labels"], inputs.real
    _checks.no_text(labels=labels)
    if jnp.shape(labels) != logits.shape and (*jnp.shape(labels), 1) != logits.shape:
        raise ValueError(
            "labels must be 0 or 1 per logit, of the shape of the logits, got "
            f"{_checks.described(labels=labels, logits=logits)}. For class numbers use "
            "objective.classification, or jax.nn.one_hot(labels, classes)."
        )
    concrete_labels = _checks.concrete(labels)
    concrete_mask = None if real is None else _checks.concrete(real)
    if concrete_labels is not None and (real is None or concrete_mask is not None):
        real_labels = concrete_labels if concrete_mask is None else concrete_labels[concrete_mask]
        _checks.within(0, 1, labels=real_labels)
    targets = jnp.asarray(labels).reshape(logits.shape).astype(logits.dtype)
    is_target = (targets >= 0) & (targets <= 1)
    values = optax.sigmoid_binary_cross_entropy(logits, jnp.where(is_target, targets, 0))
    is_usable = jnp.all(is_target, axis=-1)
    return {"task": _numerics.at_usable(jnp.mean(values, axis=-1), is_usable, real)}


def regression(inputs: Inputs) -> dict[str, Array]:
    """The task of regression: `{"task": mean over outputs of (y - t)^2}`.

    `batch["labels"]` are the targets, `[B, outputs]` like the logits, in the units of the model's
    outputs.

    Raises:
      ValueError: if outputs and targets differ in shape.
    """
    outputs, targets = inputs.student["logits"], inputs.batch["labels"]
    _checks.same_shape(logits=outputs, labels=targets)
    return {"task": jnp.mean(jnp.square(outputs - targets.astype(outputs.dtype)), axis=-1)}


def setup(
    student: ModelFn,
    teacher: ModelFn,
    *,
    student_variables: Variables,
    teacher_variables: Variables,
    inputs: Any,
    examples: int,
    steps: int,
    classes: int | None = None,
    exclusive: bool = True,
    layers: Sequence[Pair] | None = None,
    student_layout: Layout | None = None,
    teacher_layout: Layout | None = None,
    task: TermsFn | None = None,
) -> Setup:
    """Describes a pair of models with `jax.eval_shape`; nothing is computed.

    Args:
      student: the model function of the student (`linen.model(module).apply`, or your own).
      teacher: the model function of the teacher.
      student_variables: parameters and model state, arrays or their shapes.
      teacher_variables: the same for the teacher. Methods that reuse its classifier or
        differentiate its outputs need arrays, which may be tracers; shapes are enough for the
        others.
      inputs: a batch `[B, ...]`, or its shape.
      examples: size of the training set.
      steps: of the whole run, for weights on a schedule.
      classes: checked against both heads; by default the teacher's number of classes.
      exclusive: whether classes are mutually exclusive (softmax). Use False for binary and
        multi-label heads and for regression: methods on class distributions then do not apply.
      layers: pairs (student tap, teacher tap) to match. By default, the last features of both, then
        those before them, as many as the shallower network has, in the order in which they are
        computed.
      student_layout: where the student's features are; by default as found by `layout`.
      teacher_layout: the same for the teacher.
      task: `inputs -> {"task": values}`. By default cross-entropy with `batch["labels"]`: softmax
        (`objective.classification`), or sigmoid if `exclusive` is False.

    Raises:
      TypeError: if a model is not a model function, or its variables are parameters alone.
      ValueError: if a network has no logits or not one per class, a softmax head has a single
        class, or a tap does not exist (the existing ones are listed).
    """
    _model_functions.model_function(student=student, teacher=teacher)
    for name, variables in (("student", student_variables), ("teacher", teacher_variables)):
        if not isinstance(variables, tuple) or len(variables) != 2:
            raise TypeError(
                f"{name}_variables must be Variables(params, model_state), got "
                f"{type(variables).__name__}. For a model without a state write Variables(params)."
            )
    student_outputs, student_layout = _describe(
        "student", student, student_variables, inputs, student_layout
    )
    teacher_outputs, teacher_layout = _describe(
        "teacher", teacher, teacher_variables, inputs, teacher_layout
    )
    _check_logits("teacher", teacher_outputs, classes)
    count: int = teacher_outputs["logits"].shape[-1]
    _check_logits("student", student_outputs, count)
    if exclusive and count == 1 and task is None:
        raise ValueError(
            "the softmax of one logit is constant. Pass exclusive=False for a sigmoid head, or "
            "give the heads two outputs."
        )
    default_pairs = _pair_from_the_end(student_layout.features, teacher_layout.features)
    pairs = default_pairs if layers is None else _tap_pairs(layers)
    for name, taps, layout_, shapes in (
        ("student", [s for s, _ in pairs], student_layout, student_outputs),
        ("teacher", [t for _, t in pairs], teacher_layout, teacher_outputs),
    ):
        preactivation_taps = [text for pair in layout_.before_activation.items() for text in pair]
        _check_taps(name, [*taps, layout_.last, *preactivation_taps], shapes)
    before_activation = {
        (s, t): (student_layout.before_activation.get(s, s), teacher_layout.before_activation[t])
        for s, t in pairs
        if t in teacher_layout.before_activation
    }
    is_concrete = not any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(teacher_variables)
    )
    student_head = _head(student_layout, student_outputs, student_variables.params)
    teacher_head = _head(teacher_layout, teacher_outputs, teacher_variables.params)

    def run_student(params: Params, inputs: Array) -> Outputs:
        return student(params, student_variables.model_state, inputs)[0]

    def run_teacher(inputs: Array) -> Outputs:
        return teacher(*teacher_variables, inputs)[0]

    is_stateless = not jax.tree.leaves(student_variables.model_state)
    return Setup(
        classes=count,
        student=student_outputs,
        teacher=teacher_outputs,
        pairs=pairs,
        last=(student_layout.last, teacher_layout.last),
        examples=examples,
        steps=steps,
        task=task or (objective.classification if exclusive else multi_label),
        exclusive=exclusive and count > 1,
        teacher_head=teacher_head(teacher_variables.params)
        if teacher_head and is_concrete
        else None,
        student_head=student_head,
        last_maps=_last_maps(student_layout, teacher_layout, student_outputs, teacher_outputs),
        before_activation=before_activation,
        attention=_pair_from_the_end(student_layout.attention, teacher_layout.attention),
        models=Models(run_student, run_teacher) if is_stateless and is_concrete else None,
        inputs=jax.eval_shape(lambda x: x, inputs),
        params=jax.eval_shape(lambda x: x, student_variables.params),
    )


def layout(model: ModelFn, variables: Variables, inputs: Any) -> Layout:
    """Finds a network's features from the names and shapes of its outputs; nothing is computed.

    Every output is a feature, in the order in which they are computed, except the logits,
    `"pooled"` and the parts of attention modules (`path/query`, `path/key`, `path/value`,
    `path/probs`). The head reads `"pooled"` if it exists, otherwise the last feature `[B, width]`.

    Args:
      model: a model function.
      variables: of the model, arrays or their shapes.
      inputs: a batch `[B, ...]`, or its shape.
    """
    return _describe("model", model, variables, inputs, None)[1]


def _layout(outputs: Shapes, depths: Mapping[str, tuple[int, ...]]) -> Layout:
    def order(name: str) -> Any:  # layers that a scan computes at once are ordered by name
        return depths[name], trees.natural_key(name)

    attention_parts = {
        name: re.fullmatch(r"(.+)/(query|key|value|probs)", name) for name in outputs
    }
    attention = {match[1]: name for name, match in attention_parts.items() if match}
    names = (
        name for name in outputs if not attention_parts[name] and name not in ("logits", "pooled")
    )
    features = tuple(sorted(names, key=order))
    candidates = [name for name in ("pooled", *reversed(features)) if name in outputs]
    last = next((name for name in candidates if len(outputs[name].shape) == 2), "logits")
    attention_paths = sorted(attention, key=lambda path: order(attention[path]))
    return Layout(features, last, {}, tuple(attention_paths))


def linear_head(params: Params) -> Head | None:
    """The classifier called `head`: its kernel (`head/kernel`, `head/w`, or `head/weight`, which
    is read as `[classes, features]`) and bias, or None if there is none.
    """
    flat = trees.flatten(params)
    for path, leaf in flat.items():
        match = re.fullmatch(r"(.*/)?head/(kernel|w|weight)", path)
        if match and len(leaf.shape) == 2:
            prefix, name = path.removesuffix(match[2]), match[2]
            bias = flat.get(f"{prefix}bias", flat.get(f"{prefix}b"))
            return Head(leaf.T if name == "weight" else leaf, bias)
    return None


def _describe(
    name: str, model: ModelFn, variables: Variables, inputs: Any, layout: Layout | None
) -> tuple[dict[str, jax.ShapeDtypeStruct], Layout]:
    def run(params: Any, model_state: Any, inputs: Any) -> dict[str, Any]:
        return dict(_model_functions.call_model(name, model, params, model_state, inputs)[0])

    if layout is not None:
        return jax.eval_shape(run, *variables, inputs), layout
    positions, outputs = _jaxprs.outputs_by_depth(run, *variables, inputs)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(outputs)]
    depths = {path[0].key: place for path, place in zip(paths, positions, strict=True)}
    return outputs, _layout(outputs, depths)


def _head(layout: Layout, outputs: Shapes, params: Params) -> Callable[[Params], Head] | None:
    """The head as a function of parameters, if it is linear in `found.last`."""
    if layout.last == "logits":
        return None
    find = linear_head if layout.head is None else layout.head
    head = jax.eval_shape(find, params)
    expected = (outputs[layout.last].shape[-1], outputs["logits"].shape[-1])
    if head is not None and head.kernel.shape == expected:
        return find  # pyright: ignore[reportReturnType]  # head is not None: linear_head finds one
    if layout.head is None:
        return None
    raise ValueError(
        f"the head of {layout.last!r} must have the kernel {list(expected)}, got "
        f"{None if head is None else list(head.kernel.shape)}. Give Layout.last what it reads."
    )


def _check_logits(name: str, outputs: Shapes, classes: int | None) -> None:
    width = outputs["logits"].shape[-1] if "logits" in outputs else None
    if width is None or (classes is not None and width != classes):
        problem = "no logits" if width is None else f"{width} outputs"
        comparison = "" if classes is None else f", but the data has {classes} classes"
        raise ValueError(f"the {name} has {problem}{comparison}. Give it one output per class.")


def _check_taps(name: str, taps: Sequence[str], outputs: Shapes) -> None:
    for tap in taps:
        if tap not in outputs:
            listed = ", ".join(sorted(outputs, key=trees.natural_key))
            raise ValueError(f"the {name} has no tap {tap!r}. It has {listed}.")


def _tap_pairs(layers: Any) -> tuple[Pair, ...]:
    pairs = layers.items() if isinstance(layers, Mapping) else layers
    for pair in [pairs] if isinstance(pairs, str) else pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"layers must be pairs (student tap, teacher tap), got {pair!r}. Write "
                "for example layers=[('stage2', 'stage2')]."
            )
    return tuple((s, t) for s, t in pairs)


def _pair_from_the_end(student: Sequence[str], teacher: Sequence[str]) -> tuple[Pair, ...]:
    """Pairs layers from the deepest up, for any depths."""
    count = min(len(student), len(teacher))
    return tuple(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))


def _last_maps(
    student: Layout, teacher: Layout, student_outputs: Shapes, teacher_outputs: Shapes
) -> Pair | None:
    """The deepest features, if they are maps whose averages both heads read."""
    for layout, outputs in ((student, student_outputs), (teacher, teacher_outputs)):
        if layout.last != "pooled" or not layout.features:
            return None
        if len(outputs[layout.features[-1]].shape) != 4:
            return None
    return student.features[-1], teacher.features[-1]
