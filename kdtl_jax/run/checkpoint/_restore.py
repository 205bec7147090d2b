"""Reading a checkpoint folder: whole steps, the newest and the best one, and leaves by path."""

import operator
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kdtl_jax import _checks, _files, _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.run import processes, scores
from kdtl_jax.run.checkpoint import _history

KIND = "checkpoints"  # of the folder's mark
MANIFEST = "manifest.json"
STATE = "state"  # the arrays, beside the manifest
FORMAT = 3


class Restored(NamedTuple):
    """A state read back.

    `skipped` lists newer steps that were not whole, with the reason. If only a part was requested,
    `left` names the checkpoint's leaves that were not read, and `kept` the template's leaves that
    were left unchanged.
    """

    state: PyTree
    step: int
    meta: dict[str, Any]
    skipped: list[tuple[int, str]]
    left: list[str]
    kept: list[str]


class Manifest(NamedTuple):
    """The record that makes a step whole; its structure has been checked."""

    step: int
    folder: str  # the identity in the folder's mark
    owner: dict[str, str]
    meta: dict[str, Any]  # its evaluations are those of this step
    history: dict[str, Any] | None  # all evaluations up to this step
    leaves: list[dict[str, Any]]  # path, shape, dtype, entry
    files: dict[str, dict[str, Any]]  # bytes, sha256


def steps(folder: str | Path) -> list[int]:
    """The steps in a folder, oldest first, whole or not."""
    folder = _checks.path(folder=folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def problem(folder: str | Path, step: int, owner: Mapping[str, str] | None = None) -> str | None:
    """Why a step is not whole, or None if every file matches its manifest (and owner, if given)."""
    try:
        return _problem(Path(folder), step, owner)
    except OSError as error:
        return f"it cannot be read ({error})"


def best(folder: str | Path, name: str, *, minimize: bool = True) -> int:
    """The whole step with the best evaluation, the first among equals.

    Args:
      folder: as for `restore`.
      name: an entry of what `evaluate` returned at that step (`loop.run` saves evaluations). A step
        without it, or with a value that is not finite, is never the best.
      minimize: whether smaller is better.

    Raises:
      FileNotFoundError: if no whole step has a finite value, with the reason for every step.
    """
    folder = _checks.path(folder=folder)

    def choose() -> int:
        values, reasons = {}, []
        for step in steps(folder):
            reason = problem(folder, step)
            if reason is None:
                meta = read_manifest(folder / str(step)).meta
                values[step] = score(meta, step, name)
                reason = "it is not finite"
                if values[step] is None:
                    keys = [key for line in _evaluations(meta, step) for key in line]
                    names = [key[len("eval/") :] for key in keys if key.startswith("eval/")]
                    reason = f"no value of {name!r}, only of {names}"
            reasons.append(f"step {step}: {reason}")
        chosen = scores.best(list(values.values()), minimize=minimize)
        if chosen is None:
            raise FileNotFoundError(
                f"no step in {folder} has a finite {name!r} ({'; '.join(reasons) or 'no steps'}). "
                "Save whenever you evaluate: save_every=evaluate_every."
            )
        return list(values)[chosen]

    return processes.decide(choose)


def restore(
    folder: str | Path,
    template: PyTree,
    *,
    step: int | None = None,
    only: trees.Selector | None = None,
    owner: Mapping[str, str] | None = None,
) -> Restored:
    """The newest whole step, as a tree like `template`; leaves are matched by path.

    Args:
      folder: a folder that `open_folder` made.
      template: a tree of arrays or `jax.ShapeDtypeStruct`s; its structure is authoritative, and
        each leaf is placed by the template leaf's sharding (any mesh, any number of processes).
      step: restore this step instead of the newest.
      only: which leaves of the template to read; the others stay unchanged, and the checkpoint
        may hold more. None reads all of them, and the checkpoint must hold exactly these.
      owner: as given to `open_folder`; a step of another owner is refused. None skips the check.

    Raises:
      FileNotFoundError: if no step is whole (with every step's reason) or `step` does not exist.
      ValueError: if paths, shapes, dtypes or key types differ from the template, leaf by leaf.
    """
    folder = _checks.path(folder=folder).absolute()
    if step is not None:
        _checks.count(0, step=step)
        step = operator.index(step)

    def choose() -> list[Any]:
        restored_step, skipped = _choose(folder, step, owner)
        manifest = read_manifest(folder / str(restored_step))
        if manifest.history is not None:
            manifest.meta[_history.KEY] = _history.read(folder, manifest.history)
        return [restored_step, skipped, manifest._asdict()]

    restored_step, skipped, fields = processes.decide(choose)
    manifest = Manifest(**fields)
    saved = {leaf["path"]: leaf for leaf in manifest.leaves}
    flat = flatten(template)
    selected = flat if only is None else _select(template, flat, only)
    _check_match(f"{folder.name}/{restored_step}", saved, selected, exactly=only is None)
    leaves = {saved[path]["entry"]: _abstract_leaf(leaf) for path, leaf in selected.items()}
    leaves = {entry: leaf for entry, leaf in leaves.items() if np.size(leaf)}
    arrays = _read(folder / str(restored_step) / STATE, leaves)
    leaves = [
        _to_leaf_type(leaf, arrays.get(saved[path]["entry"])) if path in selected else leaf
        for path, leaf in flat.items()
    ]
    return Restored(
        jax.tree.unflatten(jax.tree.structure(template), leaves),
        restored_step,
        manifest.meta,
        [(int(number), reason) for number, reason in skipped],
        [path for path in saved if path not in selected],
        [path for path in flat if path not in selected],
    )


def flatten(tree: PyTree) -> dict[str, Any]:
    """`{path: leaf}`; the full key path if two leaves share a canonical one (0 and "0")."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = trees.leaf_paths(tree)
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    leaves: dict[str, Any] = {}
    for name, (key_path, leaf) in zip(names, pairs, strict=True):
        path = name if counts[name] == 1 else jax.tree_util.keystr(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves of the state have the path {path!r}, but a checkpoint tells leaves "
                "apart by their paths. Rename one of them."
            )
        leaves[path] = leaf
    return leaves


def describe(path: str, leaf: Any) -> dict[str, Any]:
    """A leaf as the manifest records it."""
    dtype = getattr(leaf, "dtype", None)
    return {
        "path": path,
        "shape": list(np.shape(leaf)),
        "dtype": str(np.asarray(leaf).dtype if dtype is None else dtype),
    }


def score(meta: Mapping[str, Any], step: int, name: str) -> Any:
    """The evaluation of a step, from the `meta` that `loop.run` saves; None if there is none."""
    return next((line.get(f"eval/{name}") for line in _evaluations(meta, step)), None)


def _evaluations(meta: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """The lines of a step's evaluations."""
    evaluations = meta.get("evaluations")
    lines = evaluations if isinstance(evaluations, list) else []
    return [line for line in lines if isinstance(line, dict) and line.get("step") == step]


def read_manifest(home: Path) -> Manifest:
    """The manifest in a step's folder."""
    value = _files.read_sealed(home / MANIFEST)
    if value.get("format") != FORMAT:
        version = _text.shown(value.get("format"))
        raise ValueError(f"format {version}, this version reads {FORMAT}")
    fields: dict[str, Any] = {name: value.get(name) for name in Manifest._fields}
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(Manifest).items()}
    del kinds["history"]  # see `_history.is_entry`
    invalid = [name for name, kind in kinds.items() if not isinstance(fields[name], kind)]
    if not invalid and not all(map(_is_leaf, fields["leaves"])):
        invalid = ["leaves"]
    if not invalid and not all(_is_file(name, entry) for name, entry in fields["files"].items()):
        invalid = ["files"]
    if not invalid and not _history.is_entry(fields["history"]):
        invalid = ["history"]
    if invalid:
        raise ValueError(f"{MANIFEST} is not a checkpoint's: its {invalid[0]!r} is missing or odd")
    return Manifest(**fields)


def _is_leaf(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("path", "dtype", "entry"))
        and isinstance(value.get("shape"), list)
    )


def _is_file(name: str, entry: Any) -> bool:
    is_relative = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    return is_relative and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def _problem(folder: Path, step: int, owner: Mapping[str, str] | None) -> str | None:
    home = folder / str(step)
    try:
        manifest = read_manifest(home)
        identity = _files.read_sealed(folder / _files.MARK).get("id")
    except ValueError as error:
        return str(error)
    if manifest.step != step:
        return f"it was saved as step {manifest.step} and renamed"
    if manifest.folder != identity:
        return "it was saved in another folder, by another run or for another method"
    if owner is not None and manifest.owner != dict(owner):
        owner_text = _text.shown(manifest.owner, 200) if manifest.owner else "nothing named"
        return f"it belongs to {owner_text}, not to {dict(owner)}"
    if manifest.history is not None:
        try:
            _history.read(folder, manifest.history)
        except ValueError as error:
            return str(error)
    files = manifest.files.items()
    problems = (_files.damage(home / name, _text.shown(name), entry) for name, entry in files)
    return next(filter(None, problems), None)


def _choose(
    folder: Path, step: int | None, owner: Mapping[str, str] | None
) -> tuple[int, list[tuple[int, str]]]:
    """The newest whole step, and the newer steps with the reasons why they are not whole."""
    candidates = steps(folder)
    if step is not None:
        if step not in candidates:
            listing = candidates or "none"
            raise FileNotFoundError(f"{folder} has no step {step}. Its steps: {listing}.")
        candidates = [step]
    skipped = []
    for candidate in reversed(candidates):
        reason = problem(folder, candidate, owner)
        if reason is None:
            return candidate, skipped
        skipped.append((candidate, reason))
    listing = "; ".join(f"step {s}: {reason}" for s, reason in skipped) or "it has no steps"
    raise FileNotFoundError(f"no whole checkpoint in {folder} ({listing}).")


def _select(template: PyTree, flat: Mapping[str, Any], only: trees.Selector) -> dict[str, Any]:
    flags = jax.tree.leaves(trees.mask(template, only))
    return {path: leaf for (path, leaf), flag in zip(flat.items(), flags, strict=True) if flag}


def _check_match(
    name: str, saved: Mapping[str, Any], flat: Mapping[str, Any], *, exactly: bool
) -> None:
    """Raises an error, leaf by leaf, if checkpoint and template differ."""
    template = {path: describe(path, leaf) for path, leaf in flat.items()}
    problems = [f"the checkpoint lacks {path!r}" for path in template if path not in saved]
    if exactly:
        problems += [f"the template lacks {path!r}" for path in saved if path not in template]
    for path in [path for path in template if path in saved]:
        old, new = saved[path], template[path]
        if (old["shape"], old["dtype"]) != (new["shape"], new["dtype"]):
            saved_as, expected = (f"{x['dtype']}{x['shape']}" for x in (old, new))
            problems.append(f"{path!r} was saved as {saved_as}, the template has {expected}")
    if problems:
        suffix = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"checkpoint {name} does not fit the template: {'; '.join(problems[:8])}{suffix}. Use "
            "the configuration that the run was started with, or restore a part with only="
        )


def _read(folder: Path, leaves: dict[str, Any]) -> dict[str, Any]:
    """Reads the entries of abstract arrays from the file; others are not read."""
    if not leaves:
        return {}
    arguments = ocp.args.PyTreeRestore(
        item=leaves,
        restore_args=ocp.checkpoint_utils.construct_restore_args(leaves),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, args=arguments)


def _abstract_leaf(leaf: Any) -> Any:
    """Converts a template's leaf for Orbax: a sharded abstract array, or a NumPy array."""
    if _checks.is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        sharding = jax.random.key_data(leaf).sharding if isinstance(leaf, jax.Array) else None
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding or _default())
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        sharding = leaf.sharding or _default()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.zeros(np.shape(leaf), np.asarray(leaf).dtype)


def _default() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _to_leaf_type(leaf: Any, array: Any) -> Any:
    """Converts an array to the type of the template's leaf."""
    if _checks.is_key(leaf):
        impl: list[Any] = []  # only a key or its tracer has an impl; an abstract one does not
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(array, impl=impl[0])
    if array is None:  # an array without elements
        empty = np.zeros(np.shape(leaf), leaf.dtype)
        return empty if isinstance(leaf, np.ndarray) else jnp.asarray(empty)
    return array if hasattr(leaf, "dtype") else type(leaf)(array)
