"""A state's leaves as Orbax stores them, by number, and their description by path."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import PyTree

STORABLE = (np.number, np.bool_, jax.dtypes.prng_key)


def flatten(tree: PyTree) -> dict[str, Any]:
    """`{path: leaf}`; the full key path where two leaves share a canonical one (0 and "0")."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    short = [trees.path_string(path) for path, _ in pairs]
    names = [jax.tree_util.keystr(path) for path, _ in pairs]
    names = short if len(set(short)) == len(short) else names
    return {name: leaf for name, (_, leaf) in zip(names, pairs, strict=True)}


def number(i: int) -> str:
    """The name of leaf i in the file."""
    # Orbax sees numbers: paths may hold anything, and only the manifest needs them.
    return f"leaf{i:05d}"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, concrete or abstract."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def check_storable(fn: str, flat: Mapping[str, Any]) -> None:
    """Raises TypeError unless every leaf is an array of numbers, bools or PRNG keys."""
    for path, leaf in flat.items():
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in STORABLE):
            raise TypeError(
                f"{path!r} must be an array or a number, got {type(leaf).__name__} "
                f"({dtype}). Keep strings and settings in `meta`."
            )


def describe(path: str, leaf: Any) -> dict[str, Any]:
    """A leaf as the manifest records it."""
    dtype = getattr(leaf, "dtype", None)
    return {
        "path": path,
        "shape": list(np.shape(leaf)),
        "dtype": str(np.asarray(leaf).dtype if dtype is None else dtype),
    }


@jax.jit
def _copied(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def stored(leaves: list[Any]) -> dict[str, Any]:
    """What Orbax writes: raw arrays by number, key data for keys, nothing for empty arrays."""
    raw = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
    device = [i for i, leaf in enumerate(raw) if isinstance(leaf, jax.Array) and leaf.size]
    if jax.default_backend() == "cpu":
        # There a host array may share the device's memory, which the next step reuses.
        for i, copy in zip(device, _copied([raw[i] for i in device]), strict=True):
            raw[i] = copy
    host = [np.array(x) if not isinstance(x, jax.Array) else x for x in raw]
    return {number(i): leaf for i, leaf in enumerate(host) if leaf.size}


def abstract(leaves: list[Any]) -> dict[str, Any]:
    """The template as Orbax wants it: sharded abstract arrays, or NumPy arrays."""

    def one(leaf: Any) -> Any:
        if is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, leaf)
            placed = jax.random.key_data(leaf).sharding if isinstance(leaf, jax.Array) else None
            return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=placed or _default())
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            placed = leaf.sharding or _default()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
        return np.zeros(np.shape(leaf), np.asarray(leaf).dtype)

    return {number(i): one(leaf) for i, leaf in enumerate(leaves) if np.size(leaf)}


def _default() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def restored_as(leaf: Any, read: Any) -> Any:
    """What was read, as the kind of leaf that the template holds."""
    if is_key(leaf):
        impl: list[Any] = []  # only a key or its tracer tells its kind, an abstract one does not
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(read, impl=impl[0])
    if read is None:  # an array without elements
        empty = np.zeros(np.shape(leaf), leaf.dtype)
        return empty if isinstance(leaf, np.ndarray) else jnp.asarray(empty)
    return read if hasattr(leaf, "dtype") else type(leaf)(read)


def check(name: str, stored: list[dict[str, Any]], flat: Mapping[str, Any]) -> None:
    """Refuses, leaf by leaf, where checkpoint and template differ."""
    saved = {leaf["path"]: leaf for leaf in stored}
    wanted = {path: describe(path, leaf) for path, leaf in flat.items()}
    problems = [f"the checkpoint lacks {path!r}" for path in wanted if path not in saved]
    problems += [f"the template lacks {path!r}" for path in saved if path not in wanted]
    for path in [path for path in wanted if path in saved]:
        old, new = saved[path], wanted[path]
        if (old["shape"], old["dtype"]) != (new["shape"], new["dtype"]):
            was, want = (f"{x['dtype']}{x['shape']}" for x in (old, new))
            problems.append(f"{path!r} was saved as {was}, the template has {want}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"checkpoint {name} does not fit the template: "
            f"{'; '.join(problems[:8])}{more}. Use the configuration that the run was started with."
        )
