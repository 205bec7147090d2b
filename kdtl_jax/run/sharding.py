"""Placement of arrays over devices, as JAX shardings.

A mesh has an axis `"data"` (examples are split over it) and optionally `"fsdp"` (weights, optimizer
state and examples are split over it) and `"tensor"` (a layer's work is split over it: every
device has some of the heads and hidden units, and all see the same examples). The train step itself
does not change: place the state and the batch, call the same jitted step, and XLA inserts the
collectives. `keep_placement` around the step keeps the state where it was placed. Meshes have Auto
axis types, so ordinary code such as `x @ x.T` on sharded operands works. What is not a mesh raises
TypeError.

A teacher is placed like a state, by `place(teacher, mesh)`, with its own `smallest=` if desired and
in any dtype. On devices of its own, it runs ahead of the student; see `separate_teacher`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdtl_jax import _checks, _host_arrays, train, trees
from kdtl_jax._types import ModelFn, PyTree, Variables

AXES = ("data", "fsdp")  # those that examples are split over
TensorAxes = Sequence[tuple[str, int]]  # (regex of the end of a path, axis that is split)


def make_mesh(
    *, data: int | None = None, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """A `data x fsdp x tensor` mesh over the given devices (default: all, of all processes).

    Args:
      data: size of the data axis; None uses the devices that the other axes leave.
      fsdp: size of the axis over which weights are split.
      tensor: size of the axis over which a layer's work is split, across neighboring devices.
      devices: a sequence of devices; fewer than all is fine.

    Raises:
      ValueError: if the sizes do not multiply to at most the number of devices.
    """
    all_devices = list(jax.devices() if devices is None else devices)
    _checks.count(1, **({} if data is None else {"data": data}), fsdp=fsdp, tensor=tensor)
    data = len(all_devices) // (fsdp * tensor) if data is None else data
    sizes = (data, fsdp) if tensor == 1 else (data, fsdp, tensor)
    names = (*AXES, "tensor")[: len(sizes)]
    count = math.prod(sizes)
    if count > len(all_devices) or data < 1:
        request = " x ".join(f"{n}={max(size, 1)}" for n, size in zip(names, sizes, strict=True))
        raise ValueError(
            f"{request} needs {max(data, 1) * fsdp * tensor} devices, but there are "
            f"{len(all_devices)}. On one CPU, set JAX_NUM_CPU_DEVICES before starting Python."
        )
    grid = np.array(all_devices[:count], dtype=object).reshape(sizes)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(_check_mesh(mesh), PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices of `"data"` and `"fsdp"`."""
    return NamedSharding(_check_mesh(mesh), PartitionSpec(AXES))


def _check_mesh(mesh: Any) -> Mesh:
    """Raises TypeError for anything but a mesh."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a mesh such as sharding.make_mesh(), got {type(mesh).__name__}."
        )
    return mesh


def fsdp_shardings(
    tree: PyTree, mesh: Mesh, *, smallest: int = 256, tensor: TensorAxes = ()
) -> PyTree:
    """One sharding per leaf: an axis over `"tensor"` by name, the largest other over `"fsdp"`.

    Args:
      tree: arrays or abstract shapes; a whole `TrainState` is fine (scalars and PRNG keys are
        replicated, the optimizer's moments follow their weights' shapes and names).
      mesh: from `make_mesh`. Over axes of size 1 nothing is split.
      smallest: leaves with fewer elements stay replicated: splitting them costs more than it saves.
      tensor: which axis of which leaf is split over `"tensor"`, such as `models.TENSOR_AXES`; the
        first rule that matches the end of a path applies. Indivisible axes stay whole.

    Returns:
      A tree of `NamedSharding` for `jax.device_put` or `jax.jit(out_shardings=...)`.
    """
    _checks.count(0, smallest=smallest)
    fsdp_size, tensor_size = _check_mesh(mesh).shape["fsdp"], mesh.shape.get("tensor", 1)
    rules = [(re.compile(f"(.*/)?{pattern}"), axis) for pattern, axis in tensor]

    def rule(path: str, leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        if np.prod(shape, dtype=np.int64) < smallest:
            return replicated(mesh)
        names: list[str | None] = [None] * len(shape)
        for pattern, axis in rules if tensor_size > 1 else ():
            if pattern.fullmatch(path):
                if -len(shape) <= axis < len(shape) and shape[axis] % tensor_size == 0:
                    names[axis] = "tensor"
                break
        for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if fsdp_size > 1 and names[axis] is None and shape[axis] % fsdp_size == 0:
                names[axis] = "fsdp"
                break
        while names and names[-1] is None:
            names.pop()
        return NamedSharding(mesh, PartitionSpec(*names))

    return trees.map_with_path(rule, tree)


def place(tree: PyTree, mesh: Mesh, *, smallest: int = 256, tensor: TensorAxes = ()) -> PyTree:
    """`tree` on the mesh by `fsdp_shardings`: pass it a state, parameters or a teacher.

    Arrays are copied, so donating the result never deletes those of `tree`.
    """
    shardings = fsdp_shardings(tree, mesh, smallest=smallest, tensor=tensor)
    return jax.tree.map(_put, tree, shardings)


def keep_placement(step: train.Step, state: train.TrainState) -> train.Step:
    """Makes a step place its new state like `state`, so that it compiles only once.

    Otherwise XLA may place small leaves of the result differently, and the second call, on a state
    placed differently, compiles again.

    Args:
      step: the un-jitted step.
      state: from `place`; only its shardings are read, so it may be donated afterwards.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def placed_step(
        state: train.TrainState, batch: train.Batch, teacher_params: Any = None
    ) -> tuple[train.TrainState, train.Metrics]:
        new, metrics = step(state, batch, teacher_params)
        return jax.lax.with_sharding_constraint(new, shardings), metrics

    return placed_step


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A batch split over the mesh; with several processes, each passes its own part.

    Raises:
      ValueError: if the local batch is not divisible by this process's devices. Pad it and give the
        padding weight 0 in `batch["weights"]`.
    """
    local_devices = sum(
        d.process_index == jax.process_index() for d in _check_mesh(mesh).devices.flat
    )
    divisor = max(1, local_devices // mesh.shape.get("tensor", 1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(batch)):
        if not np.ndim(leaf) or np.shape(leaf)[0] % divisor:
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} has shape "
                f"{list(np.shape(leaf))}, whose leading axis must be a multiple of the "
                f"{divisor} local devices. Pad it and set weights to 0 there."
            )
    spec = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(_host_arrays.unshared(dict(batch)), spec)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(spec, np.asarray(leaf)), dict(batch)
    )


def separate_teacher(
    teacher: ModelFn, teacher_mesh: Mesh, student_mesh: Mesh
) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """A teacher on its own devices, with its outputs moved to the student's.

    The step is made without a teacher (`make_step(student, ...)`): it finds the
    outputs in the batch. Nothing blocks, so the teacher works on the next batches while the student
    steps; with `loop.run(place=partial(attach, teacher_params))` this happens ahead of every step.

    Args:
      teacher: the teacher's model function.
      teacher_mesh: where it runs: `make_mesh(devices=jax.devices()[4:])`.
      student_mesh: where the student trains.

    Returns:
      `attach(teacher_params, batch) -> batch` on the student's mesh with `batch["teacher"]`.
      `teacher_params` (parameters or `Variables`) must be on the teacher's mesh (see `place`);
      every output has the batch as its leading axis.

    Raises:
      ValueError: with more than one process, each of which owns its devices. Give the teacher the
        student's mesh, or cache its outputs.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"works within one process, but there are {jax.process_count()}. Place the "
            "teacher on the student's mesh, or cache its outputs."
        )

    @jax.jit
    def forward(variables: Variables, inputs: Any) -> Any:
        return teacher(variables.params, variables.model_state, inputs)[0]

    def attach(teacher_params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        is_variables = isinstance(teacher_params, Variables)
        variables = teacher_params if is_variables else Variables(teacher_params)
        inputs = place_batch({"inputs": batch["inputs"]}, teacher_mesh)["inputs"]
        outputs = jax.device_put(forward(variables, inputs), batch_sharding(student_mesh))
        return place_batch(batch, student_mesh) | {"teacher": outputs}

    return attach


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """`device_put` that also works where other processes own part of the mesh."""
    if sharding.is_fully_addressable:
        # `device_put` alone would share the memory that holds it (whatever may_alias is).
        copy = jnp.copy if isinstance(leaf, Array) else np.copy
        return jax.device_put(copy(leaf) if hasattr(leaf, "dtype") else leaf, sharding)
    if _checks.is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def bytes_per_device(tree: PyTree) -> dict[int, int]:
    """`{device id: bytes}` that the tree's arrays occupy on each local device."""
    total: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array):
            continue
        data = jax.random.key_data(leaf) if _checks.is_key(leaf) else leaf
        for shard in data.addressable_shards:
            total[shard.device.id] = total.get(shard.device.id, 0) + shard.data.nbytes
    return total
