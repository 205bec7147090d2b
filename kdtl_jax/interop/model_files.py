"""Files of trained models: the weights and everything needed to use them.

    model = model_files.load("runs/distill/students/kd.safetensors")
    logits = model.predict(images)  # raw images: the file says how to scale them

Files are in the safetensors format. The metadata hold the model's text (`mlp:16`), classes, input
shape, and scaling. The file of a student that predicts through connectors (SimKD) holds these too.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kdtl_jax import _checks, _text, datasets, methods, models
from kdtl_jax._types import PyTree, Variables
from kdtl_jax.datasets import Preprocessing, Standardizer
from kdtl_jax.interop import networks, own, safetensors
from kdtl_jax.interop.networks import Network
from kdtl_jax.run import record

MOST_INPUTS = 2**26  # numbers in one input
HUGGING_FACE = "huggingface:"  # before the folder whose model it is, as a model's text
PLAIN, CONNECTED = "model", "model with connectors"  # the metadata's "kind"


class About(NamedTuple):
    """The description of a model in its file; fields are None if the file does not record them."""

    model: str | None = None
    classes: int | None = None
    scaling: Standardizer | None = None
    names: tuple[str, ...] = ()  # of the classes, if they are not numbers
    shape: tuple[int, ...] | None = None  # of one input
    preprocessing: Preprocessing | None = None  # from files of data to inputs, and to answers


class Connected(NamedTuple):
    """The parts besides the student of a method that predicts through connectors."""

    method: str  # its name in `methods.table()`
    setup: methods.Setup  # with the teacher's head
    connectors: PyTree
    memory: PyTree


class Model(NamedTuple):
    """A model read from its file."""

    # Raw inputs [N, ...] -> logits [N, classes], or numbers [N, K] in the targets' units.
    predict: Callable[[Any], np.ndarray]
    outputs: Callable[[Array], Array]  # the same, as a function of arrays for `jit`, `jax.export`
    about: About
    metadata: Mapping[str, str]  # all of the file's metadata, such as "method" and "seed"


def about(path: str | Path) -> About:
    """Reads the description of a model from its file.

    Raises:
      ValueError: if there is no such file, or its metadata are damaged.
    """
    if (path := _checks.path(path=path)).is_dir():
        raise ValueError(f"{path} is {_kind_of_folder(path)}. Name a model's file.")
    if not path.exists():
        raise ValueError(f"{path}: no such file.")
    checkpoint = safetensors.index(path)
    metadata = checkpoint.metadata
    try:
        mean, scale = (
            None if name not in metadata else np.asarray(json.loads(metadata[name]), np.float32)
            for name in ("input_mean", "input_scale")
        )
        classes = int(metadata["classes"]) if "classes" in metadata else None
        names = tuple(map(str, json.loads(metadata.get("class_names", "[]"))))
        shape = tuple(map(int, json.loads(metadata["shape"]))) if "shape" in metadata else None
        scaling = None if mean is None or scale is None else Standardizer(mean, scale)
        preprocessing = metadata.get("preprocessing")
        if preprocessing is not None:
            preprocessing = datasets.preprocessing_from_json(preprocessing)
            scaling = preprocessing.scaling or scaling  # the former in the measured precision
        info = About(metadata.get("model"), classes, scaling, names, shape, preprocessing)
        _check_sizes(info)
        if (layers := models.depth(info.model or "")) > len(checkpoint.tensors):
            raise ValueError(f"{layers} layers in {len(checkpoint.tensors)} tensors")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata are damaged ({_text.shown(str(error))}).") from None
    return info


def _check_sizes(about: About) -> None:
    """Refuses sizes that no model has, or that contradict each other."""
    input_shape, classes, preprocessing = about.shape or (), about.classes, about.preprocessing
    if any(side < 1 for side in input_shape) or math.prod(input_shape) > MOST_INPUTS:
        raise ValueError(f"inputs of shape {list(input_shape)}")
    if classes is not None and not 0 < classes < 2**31:
        raise ValueError(f"{classes} classes")
    if about.names and classes is not None and len(about.names) != classes:
        raise ValueError(f"{len(about.names)} names of {classes} classes")
    if preprocessing and classes is not None and preprocessing.outputs not in (0, classes):
        raise ValueError(f"{preprocessing.outputs} outputs of {classes} classes")
    targets = preprocessing and preprocessing.target_scaling
    for scaling, expected in ((about.scaling, input_shape), (targets, (classes or 1,))):
        for part in scaling or ():
            if not np.isfinite(part).all():
                raise ValueError("a scale that is not finite")
            if expected and not _fits(part.shape, expected):
                raise ValueError(f"a scale of shape {list(part.shape)}")
    if about.scaling is not None and not (about.scaling.scale != 0).all():
        raise ValueError("a scale that is 0")


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another without enlarging it."""
    return len(shape) <= len(target) and all(
        side in (1, length) for side, length in zip(reversed(shape), reversed(target), strict=False)
    )


def save(
    path: str | Path,
    variables: Variables,
    about: About,
    more: Mapping[str, str],
    connected: Connected | None = None,
) -> None:
    """Writes a model's file, with everything needed to use it.

    Args:
      path: the file; replaced atomically.
      variables: the model's variables, as its adapter or a train state has them.
      about: the model's description; `load` needs its `model` and `classes`.
      more: other metadata, such as `{"method": "kd", "seed": "0"}`.
      connected: for methods with `Method.predict`.

    Raises:
      ValueError: if `about` lacks the model or its classes.
    """
    if about.model is None or about.classes is None:
        raise ValueError(
            f"about must say the model and its classes, got model={about.model!r} and "
            f"classes={about.classes!r}. Write About('my_model.py:Net', 10), say."
        )
    metadata = {"model": about.model, "classes": str(about.classes)}
    metadata["kind"] = PLAIN if connected is None else CONNECTED
    if about.scaling is not None:
        mean, scale = (json.dumps(x.tolist()) for x in about.scaling)
        metadata |= {"input_mean": mean, "input_scale": scale}
    if about.names:
        metadata["class_names"] = json.dumps(about.names)
    if about.shape is not None:
        metadata["shape"] = json.dumps(about.shape)
    if about.preprocessing is not None:
        metadata["preprocessing"] = datasets.preprocessing_to_json(about.preprocessing)
    variables_tree = tree(variables)
    if connected is not None:
        metadata |= {"method": connected.method, "setup": _setup_text(connected.setup)}
        variables_tree = {"student": variables_tree, **_connected_tree(connected)}
    arrays = jax.tree.map(np.asarray, variables_tree)
    safetensors.save(path, arrays, metadata={**metadata, **more})


def tree(variables: Variables) -> PyTree:
    """The tree that a model's safetensors file holds: parameters, or all collections by name."""
    state = variables.model_state
    if isinstance(state, nnx.State) or not isinstance(state, Mapping):  # from NNX and Equinox
        state = own.stored(state)
    return variables.params if state is None else {"params": variables.params, **state}


def as_variables(leaves: PyTree, template: Variables) -> Variables:
    """The inverse of `tree`."""
    if template.model_state is None:
        return Variables(leaves)
    return Variables(leaves["params"], {name: leaves[name] for name in template.model_state})


def filled(path: str, flat: Mapping[str, Any], template: Variables) -> Variables:
    """Fills a template with leaves by path, as laid out by `tree`; `path` is for messages.

    Raises:
      ValueError: naming each leaf that is missing, extra, of another shape, or not finite.
    """
    try:
        leaves = safetensors.fill(tree(template), flat)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error} Does it hold this model, for these classes?") from None
    record.check_finite(path, leaves := jax.tree.map(np.array, leaves))
    return as_variables(leaves, template)


def load(path: str | Path, *, model: Any = None, shape: Sequence[int] | None = None) -> Model:
    """Loads a model for use: `predict` takes raw inputs and returns numbers in the data's units.

    Args:
      path: a file written by `save`, by `kdtl distill` or by `kdtl transfer`.
      model: for a model of your own, its class or factory, as in `own.network`; for one from a
        Hugging Face folder, the folder's module. Loading a file never reads anything else.
      shape: the shape of one input, for a file that does not record it; without it, the first
        batch determines it.

    Raises:
      ValueError: if it is not such a file or is damaged; the message says what it is, in one line.
    """
    info = about(path)
    metadata = safetensors.index(path).metadata
    if info.model is None or info.classes is None:
        raise ValueError(
            f"{path} holds weights, but does not say which model they belong to: kdtl distill or "
            "kdtl transfer did not write it. Name one of a run's students/*.safetensors."
        )
    if is_own(info.model) and model is None:
        raise ValueError(
            f"{path} belongs to {info.model}, a model of your own. Pass it: model= here, --model "
            "on the command line."
        )
    if (folder := hugging_face_of(info.model)) and model is None:
        raise ValueError(
            f"{path} belongs to the model of the Hugging Face folder {folder}. Pass it: "
            f"model=huggingface.load({folder!r}).module here, --model {folder} on the command line."
        )
    info = info._replace(shape=info.shape or (None if shape is None else tuple(shape)))

    @functools.cache
    def function_for(shape: tuple[int, ...]) -> Callable[[Array], Array]:
        if info.shape not in (None, shape):
            expected, received = (", ".join(map(str, ("N", *x))) for x in (info.shape or (), shape))
            raise ValueError(f"{path}: inputs must be [{expected}], got [{received}].")
        return _build_function(str(path), info, metadata, shape, model)

    if info.shape is not None:
        function_for(info.shape)  # errors of the file are reported now

    units = info.preprocessing and info.preprocessing.target_scaling

    def outputs(inputs: Array) -> Array:
        scaled = jnp.asarray(inputs, jnp.float32)
        if info.scaling is not None:
            parts = (jnp.asarray(x, jnp.float32) for x in info.scaling)
            mean, scale = (jnp.broadcast_to(x, inputs.shape) for x in parts)
            scaled = (scaled - mean) / scale
        answers = function_for(tuple(inputs.shape[1:]))(scaled)
        if units is None:
            return answers
        mean, scale = (jnp.asarray(x, jnp.float32)[None] for x in units)
        return answers * scale + mean

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> Callable[[Array], Array]:
        return jax.jit(function_for(shape))

    def predict(inputs: Any) -> np.ndarray:
        inputs = np.asarray(inputs)
        if inputs.ndim < 1 or inputs.dtype.kind not in "iufb":
            raise ValueError(f"inputs must be numbers [N, ...], got {inputs.dtype} {inputs.shape}.")
        run = compiled(tuple(inputs.shape[1:]))

        def scaled(rows: np.ndarray) -> Array:
            scaling = info.scaling
            rows = rows if scaling is None else (rows - scaling.mean) / scaling.scale
            return run(jnp.asarray(rows.astype(np.float32)))

        answers = networks.in_batches(scaled, inputs, info.classes or 0)
        return answers if units is None else answers * units.scale + units.mean

    return Model(predict, outputs, info, metadata)


def hugging_face_of(text: str) -> str | None:
    """The folder in `huggingface:FOLDER`, a model's text; None for others."""
    return text.removeprefix(HUGGING_FACE) if text.startswith(HUGGING_FACE) else None


def is_own(text: str) -> bool:
    """Whether a model's text names a file of Python, as in `my_model.py:Net`."""
    return ".py:" in text


def _precision(name: str) -> Any:
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"its metadata says a precision of {_text.quoted(name)}")
    return jnp.dtype(name)


def _build_function(
    path: str, info: About, metadata: Mapping[str, str], shape: tuple[int, ...], model: Any
) -> Callable[[Array], Array]:
    """Builds the function from scaled inputs to logits."""
    assert info.model is not None and info.classes is not None
    example = jnp.zeros((1, *shape), jnp.float32)
    try:
        dtype = None if "precision" not in metadata else _precision(metadata["precision"])
        if is_folder := hugging_face_of(info.model) is not None:
            model = model.clone(classes=info.classes)  # it may have been trained for others
        if is_folder or is_own(info.model):
            net = own.network(model, classes=info.classes, example=example, dtype=dtype)
        else:
            net = networks.network(models.named(info.model, info.classes), example, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_text.shown(str(error), 1000)}") from None
    if metadata.get("kind") == CONNECTED:
        return _connected_function(path, net, info, metadata, example)
    loaded = filled(path, safetensors.load(path), networks.abstract(net, example))
    return lambda x: net.apply(loaded.params, loaded.model_state, x)[0]["logits"]


def _connected_function(
    path: str, net: Network, info: About, metadata: Mapping[str, str], example: Array
) -> Callable[[Array], Array]:
    assert info.classes is not None
    entries, flat = {entry.name: entry for entry in methods.table()}, safetensors.load(path)
    head = {name: jnp.asarray(x) for name, x in flat.items() if name.startswith("teacher_head/")}
    try:
        entry = entries[metadata["method"]]
        setup = _setup_from(json.loads(metadata["setup"]), info.classes)
        setup = setup._replace(
            teacher_head=methods.Head(head["teacher_head/kernel"], head.get("teacher_head/bias"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata are damaged ({error}).") from None
    template = networks.abstract(net, example)
    method = entry.build(setup)
    key = jax.random.key(0)
    templates: dict[str, Any] = {
        "student": tree(template),
        "connectors": jax.eval_shape(method.connectors, key),
        "memory": jax.eval_shape(method.memory, key),
    }
    loaded = safetensors.fill(templates, {name: x for name, x in flat.items() if name not in head})
    record.check_finite(path, loaded := jax.tree.map(np.array, loaded))
    student, predict = as_variables(loaded["student"], template), method.predict
    assert predict is not None

    def logits(x: Array) -> Array:
        outputs, _ = net.apply(student.params, student.model_state, x)
        return predict(loaded["connectors"], loaded["memory"], outputs)

    return logits


def _connected_tree(connected: Connected) -> dict[str, PyTree]:
    head = connected.setup.teacher_head
    assert head is not None, "a method that predicts through connectors reads the teacher's head"
    return {
        "connectors": connected.connectors,
        "memory": connected.memory,
        "teacher_head": {k: x for k, x in head._asdict().items() if x is not None},
    }


def _setup_text(setup: methods.Setup) -> str:
    """The parts of a setup that a method reads when it predicts, as JSON."""
    shapes = {
        side: {tap: [list(x.shape), x.dtype.name] for tap, x in outputs.items()}
        for side, outputs in (("student", setup.student), ("teacher", setup.teacher))
    }
    fields = ("pairs", "last", "last_maps", "exclusive")
    return json.dumps({**shapes, **{name: getattr(setup, name) for name in fields}})


def _setup_from(fields: Mapping[str, Any], classes: int) -> methods.Setup:
    """The inverse of `_setup_text`."""
    student, teacher = (
        {tap: jax.ShapeDtypeStruct(shape, dtype) for tap, (shape, dtype) in fields[side].items()}
        for side in ("student", "teacher")
    )
    return methods.Setup(
        classes,
        student,
        teacher,
        tuple((s, t) for s, t in fields["pairs"]),
        tuple(fields["last"]),
        examples=1,
        steps=1,
        exclusive=fields["exclusive"],
        last_maps=None if fields["last_maps"] is None else tuple(fields["last_maps"]),
    )


def _kind_of_folder(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if students := sorted(path.name for path in (folder / "students").glob("*.safetensors")):
        return f"a run folder, with students/{', students/'.join(students)}"
    if "plan.json" in names:
        return "a teacher cache: outputs, not a model"
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.json"} or any(
        name.isdecimal() for name in names
    ):
        return "a folder of checkpoints"
    if "config.json" in names:
        return "a Hugging Face folder"
    return "a folder"
