"""What a distillation method is: a name, a paper, and a function from shapes to terms.

A method is data. `Method.build(setup, options)` looks at shapes alone and returns `Built`: the
distillation terms, their weights, and how connectors and memory start. The engine that trains adds
the term "task", the cross-entropy with the labels, with the weight that the method gives it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import Array

from kdtl_jax._types import Outputs, Params, PyTree, Scalar, Schedule
from kdtl_jax.objective import TermsFn

Weight = Scalar | Schedule
Shapes = Mapping[str, jax.ShapeDtypeStruct]
TASK = "task"


class Head(NamedTuple):
    """A linear classifier: `features @ kernel + bias`."""

    kernel: Array  # [features, classes]
    bias: Array | None = None  # [classes]


class Models(NamedTuple):
    """Both networks as functions of a batch of inputs, for losses of their derivatives."""

    student: Callable[[Params, Array], Outputs]  # of the student's parameters and inputs
    teacher: Callable[[Array], Outputs]


class Setup(NamedTuple):
    """What a method may look at when it is built: shapes, and for some the frozen teacher.

    Batches hold `"inputs"`, integer `"labels"` `[B]` and `"index"` `[B]`, the examples' places in
    the training set. Whatever arrays stand here may be tracers: build within the traced function
    to give every seed its own teacher.
    """

    classes: int
    student: Shapes  # outputs by tap, with the batch axis: "logits" and every feature
    teacher: Shapes
    pairs: tuple[tuple[str, str], ...]  # (student tap, teacher tap), in order of depth
    last: tuple[str, str]  # what the heads read, `[B, features]`
    examples: int  # of the training set
    steps: int  # of the whole run
    teacher_head: Head | None = None
    student_head: Callable[[Params], Head] | None = None  # of the student's own parameters
    last_maps: tuple[str, str] | None = None  # maps whose averages are `last`, where both pool
    # Tap -> the tap of the same layer before its activation, for either model.
    before_activation: Mapping[str, str] = {}
    attention: tuple[tuple[str, str], ...] = ()  # paths of matched attention modules
    models: Models | None = None


class Options(NamedTuple):
    """What a user may change for every method. None keeps the method's own value."""

    temperature: float | None = None  # methods without one ignore it
    weights: Mapping[str, float] = {}  # by term, "task" included


DEFAULTS = Options()


class Built(NamedTuple):
    """A method for one pair of models."""

    terms: TermsFn  # the distillation terms; connectors at `inputs.connectors`
    weights: Mapping[str, Weight]  # of every term and of "task": the paper's or its code's
    connectors: Callable[[Array], Params]  # key -> parameters, {} if there are none
    memory: Callable[[Array], PyTree]  # key -> memory, None if there is none
    # Logits at inference from (`state.params`, the student's outputs), where connectors and the
    # teacher's head make the prediction. None: the student's own logits.
    predict: Callable[[Params, Outputs], Array] | None = None


class Method(NamedTuple):
    """A published method."""

    name: str
    title: str
    paper: str  # authors, arXiv id or venue, year
    needs: str  # "labels" | "logits" | "features" | "maps" | "tokens" | "networks"
    connector: bool  # trains glue beside the student
    build: Callable[[Setup, Options], Built]
    applies: Callable[[Setup], str | None]  # None, or the reason why not in words


def no_connectors(key: Array) -> Params:
    """`Built.connectors` of a method that trains nothing but the student."""
    return {}


def no_memory(key: Array) -> PyTree:
    """`Built.memory` of a method that remembers nothing."""
    return None


def build(method: Method, setup: Setup, options: Options = DEFAULTS) -> Built:
    """The method for one pair, the user's weights in place of its own.

    Raises:
      ValueError: if the method does not apply to the pair (with the reason), or a weight is given
        for a term that it does not have.
    """
    reason = method.applies(setup)
    if reason is not None:
        raise ValueError(f"{method.name}: {reason}")
    built = method.build(setup, options)
    unknown = sorted(options.weights.keys() - built.weights.keys())
    if unknown:
        raise ValueError(
            f"{method.name}: weights are for the terms {sorted(built.weights)}, got {unknown}."
        )
    return built._replace(weights={**built.weights, **options.weights})
