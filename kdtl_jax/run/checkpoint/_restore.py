"""Reading a checkpoint folder: which steps are whole, and the newest of them."""

import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdtl_jax import _checks, _files
from kdtl_jax._types import PyTree
from kdtl_jax.run.checkpoint import _leaves

MANIFEST = "manifest.json"
FORMAT = 1


class Restored(NamedTuple):
    """A state read back; `skipped` lists newer steps that were not whole, with the reason."""

    state: PyTree
    step: int
    meta: dict[str, Any]
    skipped: list[tuple[int, str]]


def steps(folder: str | Path) -> list[int]:
    """The steps in a folder, oldest first, whole or not."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def problem(folder: str | Path, step: int) -> str | None:
    """Why a step is not whole, or None if every file matches its manifest."""
    home = Path(folder) / str(step)
    try:
        manifest = _files.read_sealed(home / MANIFEST)
    except ValueError as error:
        return str(error)
    if manifest["format"] != FORMAT:
        return f"format {manifest['format']}, this version reads {FORMAT}"
    for name, known in manifest["files"].items():
        path = home / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
        if _files.sha256(path) != known["sha256"]:
            return f"{name} was altered: its SHA-256 does not match"
    return None


def restore(folder: str | Path, template: PyTree, *, step: int | None = None) -> Restored:
    """The newest whole step, as a tree like `template`.

    Args:
      folder: a folder that `open_folder` made.
      template: a tree of arrays or `jax.ShapeDtypeStruct`s; its structure is authoritative, and
        each leaf is placed by the template leaf's sharding (any mesh, any number of processes).
      step: take this step alone instead of the newest.

    Raises:
      FileNotFoundError: if no step is whole, with every step's reason; or `step` does not exist.
      TypeError: if `step` is not an integer.
      ValueError: if paths, shapes, dtypes or key types differ from the template, leaf by leaf.
    """
    folder = Path(folder).absolute()
    candidates = steps(folder)
    if step is not None:
        _checks.count(0, step=step)
        step = operator.index(step)
        if step not in candidates:
            raise FileNotFoundError(
                f"{folder} has no step {step}. Its steps: {candidates or 'none'}."
            )
        candidates = [step]
    found, skipped = _choose(folder, candidates)
    if found is None:
        listed = "; ".join(f"step {s}: {why}" for s, why in skipped) or "it has no steps"
        raise FileNotFoundError(f"no whole checkpoint in {folder} ({listed}).")
    manifest = _files.read_sealed(folder / str(found) / MANIFEST)
    flat = _leaves.flatten(template)
    _leaves.check(f"{folder.name}/{found}", manifest["leaves"], flat)
    leaves = list(flat.values())
    with ocp.StandardCheckpointer() as reader:
        home = folder / str(found) / "state"
        read = reader.restore(home, _leaves.abstract(leaves)) if _leaves.abstract(leaves) else {}
    restored = [
        _leaves.restored_as(leaf, read.get(_leaves.number(i))) for i, leaf in enumerate(leaves)
    ]
    state = jax.tree.unflatten(jax.tree.structure(template), restored)
    return Restored(state, found, manifest["meta"], skipped)


def _choose(folder: Path, candidates: list[int]) -> tuple[int | None, list[tuple[int, str]]]:
    """The newest whole step; with several processes the first one looks and tells the others."""
    found, skipped = None, []
    if jax.process_index() == 0:
        for step in reversed(candidates):
            reason = problem(folder, step)
            if reason is None:
                found = step
                break
            skipped.append((step, reason))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        agreed = multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found))
        found = int(agreed) if int(agreed) >= 0 else None
    return found, skipped
