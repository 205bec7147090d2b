"""The teacher's cached outputs: what a run needs, what a cache has, and reading it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtl_jax import methods
from kdtl_jax._types import Variables
from kdtl_jax.interop import networks
from kdtl_jax.methods import Entry
from kdtl_jax.recipes import _models
from kdtl_jax.recipes._pair import Pair
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import teacher_cache


def taps(entries: Sequence[Entry], pair: Pair) -> list[str]:
    """The teacher's outputs that methods read: its logits, or all if any method reads more."""
    published = methods.table()  # a user's method may read anything
    if all(entry in published and entry.needs in ("labels", "logits") for entry in entries):
        return ["logits"]
    return sorted(networks.output_shapes(pair.teacher, pair.example))


def check_folder(folder: Path, *, has_teacher: bool) -> None:
    """Rejects an unsuitable existing cache before the data are read."""
    plan, _ = _plan(folder)
    if plan is None:
        return
    if not has_teacher:
        raise UsageError(
            f"--teacher-cache {folder} holds the outputs of a teacher. Name its weights with "
            "--teacher-weights, or another folder for those of a teacher trained here."
        )
    if (plan.fingerprint.logits or "dense") != "dense":
        raise UsageError(
            f"--teacher-cache {folder} holds {plan.fingerprint.logits}, but these methods read all "
            "classes. Write another with kdtl cache without --top-k."
        )


def check(
    folder: Path, pair: Pair, entries: Sequence[Entry], *, precision: str = "float32"
) -> None:
    """Rejects an unsuitable existing cache before anything is trained."""
    plan, is_whole = _plan(folder)
    if plan is None:
        return
    required, available = taps(entries, pair), plan.fingerprint.taps or ()
    missing = [tap for tap in required if tap not in available]
    if missing:
        readers = [entry.name for entry in entries if taps([entry], pair) != ["logits"]]
        raise UsageError(
            f"--teacher-cache {folder} holds {', '.join(available)}, but {', '.join(readers)} read "
            f"{', '.join(missing)} too. Write another with kdtl cache --taps all, or leave these "
            "methods out."
        )
    try:
        if is_whole:
            expected = _expected(pair, pair.teacher_variables, required)
            teacher_cache.open_cache(folder, expect=expected, contents=False)
        elif pair.teacher_variables is not None:  # the teacher will complete it here
            fingerprint = _expected(pair, pair.teacher_variables, available)._replace(
                dtype="float32", preprocessing=_preprocessing(precision)
            )
            teacher_cache.begun(folder, expect=fingerprint)
    except ValueError as error:
        complete = "" if is_whole else " It is not finished: complete it with kdtl cache."
        raise UsageError(f"--teacher-cache: {error}{complete}") from None


def outputs(
    folder: Path, pair: Pair, frozen: Variables, precision: str, required: Sequence[str]
) -> Any:
    """Reads the outputs in a cache, after filling, completing or repairing it if necessary.

    A complete cache of this teacher on these data is accepted in any precision (`kdtl cache
    --dtype`, `--precision`) and with any additional outputs: they were chosen when it was written.
    """
    net, inputs = pair.teacher, {"inputs": pair.arrays["inputs"]}
    expected = _expected(pair, frozen, required)
    try:
        return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected))
    except (FileNotFoundError, ValueError):  # `write` repairs it, or reports the difference
        plan, _ = _plan(folder)
        stored_taps = required if plan is None else plan.fingerprint.taps or required
        teacher_cache.write(
            folder, net.apply, frozen, inputs, batch_size=512, taps=stored_taps, **_source(pair),
            preprocessing=_preprocessing(precision),
        )  # fmt: skip
    return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected, contents=False))


def _plan(folder: Path) -> tuple[teacher_cache.Plan | None, bool]:
    """The plan of a cache, or None, and whether the cache is complete."""
    try:
        return teacher_cache.open_cache(folder, expect=None, contents=False).plan, True
    except (FileNotFoundError, ValueError):  # no cache, or an incomplete or damaged one
        try:
            return teacher_cache.begun(folder), False
        except ValueError:  # `write` reports the error
            return None, False


def _preprocessing(precision: str) -> dict[str, str]:
    return {} if precision == "float32" else {"precision": precision}


def _source(pair: Pair) -> dict[str, Any]:
    return {
        "model": _models.identity(pair.teacher_text),
        "classes": pair.splits.train.class_names(),
    }


def _expected(
    pair: Pair, variables: Variables | None, required: Sequence[str]
) -> teacher_cache.Fingerprint:
    fingerprint = teacher_cache.fingerprint(
        variables, {"inputs": pair.arrays["inputs"]}, taps=required, **_source(pair)
    )
    return fingerprint._replace(dtype=None, preprocessing=None)
